from dataclasses import replace

import pytest

from comad.planning.forecast import FORMULA, Disk, Plan, Stage, Target
from comad.planning.measure import room_for, straight_line
from comad.planning.profile import Flops

PLAN = Plan(
    task="comad distill",
    machine="1 CPU thread",
    epochs=16.0,
    images_per_step=128,
    batch=64,
    measured_batch=32,
    stages={"live": Stage(100.0, 2.0, Flops(3e9, 1e9)), "cached": Stage(700.0, 0.5, Flops(0.0, 1e9))},
    other={"loading": 5.0, "scores": 45.0},
    view_seconds=1 / 512,
    readers=2,
    operations=2000,
    gradient_bytes=10**8,
    scored=1000,
    peak=2 * 10**9,
    largest_batch=640,
    estimated=True,
    disk=Disk(30 * 10**6, 4 * 10**8, 10**5, 3 * 10**6),
)
TARGET = Target(gpus=4, gpu_tflops=100.0, mfu=0.25, gpu_cores=8)


def test_a_run_is_its_steps_and_all_else():
    assert PLAN.steps == 800 and PLAN.images == 102_400
    assert PLAN.training_seconds == 100 * 2.0 + 700 * 0.5
    assert PLAN.seconds == 550 + 50


def test_a_step_takes_no_less_than_reading_its_images():
    assert replace(PLAN, view_seconds=1 / 64).training_seconds == 100 * 2.0 + 700 * 1.0  # 128 / 64 per s / 2 readers
    assert replace(PLAN, view_seconds=1 / 64, readers=0).training_seconds == 800 * 2.0


def test_operations_of_teachers_end_with_the_cache():
    assert PLAN.flops == Flops(100 * 128 * 3e9, 800 * 128 * 1e9)


def test_other_machines_are_bound_by_the_longest_part():
    parts = PLAN.seconds_on(TARGET)
    assert parts == pytest.approx(
        {
            "teachers": 100 * 128 * 3e9 / 100e12,
            "student": 800 * 128 * 1e9 / 100e12,
            "decode": 102_400 / 512 / 32,
            "launches": 800 * 2000 * 6e-6,
            "network": 800 * 1.5 * 1e8 / 25e9,
            "scoring": 1000 / 512 / 32,
        }
    )
    told = PLAN.as_dict(TARGET)["gpus"]
    assert told["bottleneck"] == "launches" and told["formula"] == FORMULA
    assert told["hours"] == pytest.approx((parts["launches"] + parts["scoring"]) / 3600)
    slow = replace(TARGET, gpu_tflops=5.0)
    assert PLAN.total_on(slow) == pytest.approx(
        20 * (parts["teachers"] + parts["student"]) + 1000 * (3e9 + 1e9 / 3) / 5e12
    )


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [({"view_seconds": 1.0}, "decode"), ({"gradient_bytes": 10**12}, "network"), ({"scored": 10**8}, "scoring")],
)
def test_the_bottleneck_is_named(change, bottleneck):
    assert f"the bottleneck is {bottleneck}" in replace(PLAN, **change).text(TARGET)


def test_what_is_told():
    text = PLAN.text(TARGET)
    for words in ("10.0 min", "16 epochs, 800 steps of 128 images", "640 (an estimate", "batches of 32", "on 4 GPUs",
                  "teachers 384 GFLOPs, student 128 GFLOPs", "teacher cache 0.40 GB", FORMULA):  # fmt: skip
        assert words in text, words
    told = PLAN.as_dict(TARGET)
    assert told["disk"]["total"] == 433_100_000 and told["images_per_s"] == pytest.approx(102_400 / 550)
    assert told["stages"]["cached"] == {
        "steps": 700.0,
        "seconds_per_step": 0.5,
        "images_per_s": 256.0,
        "flops_per_step": {"teachers": 0.0, "student": 128e9},
    }


def test_the_largest_batch_is_where_the_line_meets_the_memory():
    assert straight_line((2, 1200), (8, 1800)) == (1000, 100)
    assert room_for((1000.0, 100.0), 5050) == 40
    assert room_for(straight_line((2, 1200), (8, 1200)), 5000) == 0  # nothing can be said


@pytest.mark.parametrize(
    ("change", "words"),
    [({"gpus": 0}, "--gpus 0"), ({"mfu": 1.5}, "at most 1"), ({"gpu_tflops": -1.0}, "--gpu-tflops")],
)
def test_a_machine_that_there_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        Target(**change).check()
