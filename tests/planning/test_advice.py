from dataclasses import replace

import pytest

from comad.distillation.masking import WholeImages
from comad.planning.advice import advise
from comad.planning.forecast import Disk, Plan, Stage
from comad.planning.profile import Flops
from comad.presets import recipe

CONFIG = replace(recipe("consensus", demo=False), data="photos", teachers=("a", "b"))


def forecast(optim, seconds=2.0, **changes):
    """Ten steps an epoch, three quarters of which are the teachers', and 100 seconds around them."""
    plan = Plan(
        task="comad distill",
        machine="1 CPU thread",
        epochs=optim.epochs,
        images_per_step=256,
        batch=256,
        measured_batch=256,
        stages={"live": Stage(10 * optim.epochs, seconds, Flops(3e9, 1e9))},
        other={"scores": 100.0},
        view_seconds=1 / 1024,
        readers=2,
        operations=2000,
        gradient_bytes=10**8,
        scored=1000,
        peak=2 * 10**9,
        largest_batch=512,
        estimated=True,
        disk=Disk(1, 0, 1, 1),
    )
    return replace(plan, **changes)


def lines(config, **changes):
    return advise(config, lambda optim: forecast(optim, **changes), forecast(config.optim, **changes))


def test_a_plain_run():
    config = replace(CONFIG, optim=replace(CONFIG.optim, epochs=100.0))
    length, cache, teachers = lines(config)
    assert length == "--budget 20min is 55 epochs, --budget 1h is 175 epochs, --budget 8h is 1430 epochs"
    # 98 of 100 epochs of ten steps are spared their 1.5 seconds of the teachers
    assert cache.startswith("--cache-teachers --loader.fixed-views 2 ") and "not 100, " in cache
    assert f"about {98 * 10 * 1.5 / 60:.1f} min less" in cache
    assert teachers.endswith("comad teachers compare a b --data photos")


@pytest.mark.parametrize(
    "changes",
    [
        {"teachers": ("a",)},
        {"cache_teachers": True},
        {"method": replace(CONFIG.method, masking=WholeImages(mixup=True))},
        {"optim": replace(CONFIG.optim, epochs=4.0)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_apply_is_not_said(changes):
    told = lines(replace(CONFIG, **changes))
    assert len(told) == 2 and told[0].startswith("--budget 20min")
    assert ("teachers compare" in told[1]) == ("teachers" not in changes)


def test_a_time_that_is_too_short_is_left_out():
    assert lines(CONFIG, other={"scores": 3000.0})[0] == "--budget 1h is 30 epochs, --budget 8h is 1290 epochs"


def test_limits_of_the_machine():
    slow = lines(CONFIG, view_seconds=1 / 32)
    assert any(line.startswith("reading images is the limit") for line in slow)
    assert not any("--cache-teachers" in line for line in slow)  # the teachers are done before the images are there
    (small,) = (line for line in lines(CONFIG, largest_batch=100) if "does not fit" in line)
    assert small == "a pass of 256 images does not fit: --optim.microbatch 100 or less, same batch"
