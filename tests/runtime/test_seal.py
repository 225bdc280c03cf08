"""What a run reads back is as it was written, or it is told."""

import json

import pytest

from comad.runtime.recipe import read_recipe, write_recipe
from comad.runtime.run import RunConfig
from comad.runtime.seal import is_intact, is_text_intact, sealed, sealed_text


def test_an_object_that_was_changed_is_not_intact():
    written = json.dumps(sealed({"epochs": 3.0, "nested": {"b": [1, 2], "a": "ü"}}))
    assert is_intact(json.loads(written)) and is_intact(sealed(json.loads(written)))
    assert is_intact(dict(reversed(json.loads(written).items())))  # the order of keys is no content
    assert not is_intact(json.loads(written.replace("3.0", "4.0")))
    assert not is_intact(json.loads(written.replace("2]", "2, 3]")))
    assert is_intact({"epochs": 3.0})  # of an older version


@pytest.mark.parametrize(("old", "new"), [("seed: 0", "seed: 1"), ("keep: 2", "keep:  2"), ("seed", "# seed")])
def test_a_recipe_that_was_edited_counts_and_is_told(tmp_path, capsys, old, new):
    path = tmp_path / "config.yaml"
    write_recipe(RunConfig(), path)
    assert read_recipe(RunConfig, path) == RunConfig() and capsys.readouterr().err == ""
    text = path.read_text()
    assert is_text_intact(text) and text == sealed_text(text.partition("\n")[2])
    path.write_text(text.replace(old, new, 1))
    assert read_recipe(RunConfig, path).seed == int("1" in new)
    assert capsys.readouterr().err == (
        f"comad: {path} was edited or damaged since a run wrote it; it counts as it is now.\n"
    )
