from dataclasses import replace

import huggingface_hub
import pytest
import yaml

from comad.export.card import model_card, plain
from comad.models.teachers import TeacherCard

from .conftest import CARD

HOSTILE = '<script>alert(1)</script> | `x` [link](javascript:1)\n---\nlicense: "mit"\n# Title **b**'


def test_the_hub_reads_the_metadata():
    card = huggingface_hub.ModelCard(model_card(CARD, [("With timm", "import timm")]))
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-feature-extraction"
    assert "```python\nimport timm\n```" in card.text


def test_a_licence_that_the_hub_has_no_name_for():
    card = huggingface_hub.ModelCard(model_card(replace(CARD, licence="CC-BY-NC 4.0, DINOv3"), []))
    assert card.data.license == "other" and card.data.license_name == "cc-by-nc-4.0-dinov3"
    assert "Licence: CC-BY-NC 4.0, DINOv3." in card.text


def test_text_of_files_stays_text():
    teacher = TeacherCard("t", "s", "f", "vit", "ab", 2, 8, 2, 4, 1, 1e-6, (0.5,) * 3, (0.5,) * 3, ("patch",), "x", 1)
    teacher = replace(teacher, name=HOSTILE, licence=HOSTILE)
    score = {"name": HOSTILE, "role": HOSTILE, "knn": 61.25}
    card = replace(
        CARD,
        name=HOSTILE,
        about=HOSTILE,
        data=HOSTILE,
        licence=HOSTILE,
        preset=HOSTILE,
        command=HOSTILE,
        teachers=(teacher,),
        scores=(score,),
        intended_use=HOSTILE,
    )
    text = model_card(card, [])
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "other" and huggingface_hub.ModelCard(text).data.license == "other"
    shown = "\n".join(line.replace(r"\`", "").split("`", 1)[0] for line in body.splitlines())  # code shows what it is
    assert "<" not in shown and "](" not in shown.replace(r"\](", "") and "\nlicense:" not in body
    titles = [line for line in body.splitlines() if line.startswith("#")]
    assert len(titles) == 6 and len({line.count(" | ") for line in body.splitlines() if line.startswith("| ")}) == 2


@pytest.mark.parametrize("text", ["a", "61.2 %", "ViT-Ti/16"])
def test_plain_words_are_left_alone(text):
    assert plain(text) == text


def test_facts_of_data_and_numbers_of_images():
    scores = ({"name": "student", "role": "student", "knn": 61.25},)
    text = model_card(replace(CARD, data_images={"train": 7573, "val": 1095}, scored_images=2167, scores=scores), [])
    assert "images: 7,573 train, 1,095 val" in text and "Top-1 percent on the 2,167 test images" in text
    assert "## Intended use" in text
