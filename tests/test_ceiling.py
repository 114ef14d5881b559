import pytest

from perf.ceiling import SHARED_CORES, ceiling


def stage(images_per_second: float, cpu_seconds: float = 0.0, *, batch: int = 100, ranks: int = 1) -> dict:
    return {
        "images_per_second": {"median": images_per_second},
        "images_per_second_per_rank": images_per_second / ranks,
        "seconds_per_step": {"median": batch / images_per_second},
        "cpu_seconds_per_step": cpu_seconds,
        "cores_of_others": 0.0,
    }


def parts(wait: float, work: float) -> dict:
    return {"data_wait": {"median": wait}, "step": {"median": work}}


def ceiling_of(loader, step, training, training_parts=None, *, ranks=1, cores=2.0):
    stages = {"loader": loader, "step": step, "training": training}
    return ceiling(stages, training_parts, batch_size=100, ranks=ranks, cores_per_rank=cores)


@pytest.mark.parametrize(("loader", "step", "expected"), [(300, 200, 120), (200, 300, 120), (1000, 10, 1000 / 101)])
def test_on_shared_cores_the_rates_add_up_as_resistances_do(loader, step, expected):
    """Each keeps both cores busy all the time: 1 / (1/loader + 1/step)."""
    found = ceiling_of(stage(loader, 2 * 100 / loader), stage(step, 2 * 100 / step), stage(0.99 * expected))
    assert found["images_per_second"] == pytest.approx(expected)
    assert (found["set_by"], found["why_not"]) == (SHARED_CORES, None)
    assert found["training_over_ceiling"] == pytest.approx(0.99)


@pytest.mark.parametrize(("loader", "step", "set_by"), [(300, 200, "step"), (150, 200, "loader")])
def test_a_loader_that_only_waits_takes_no_core_from_the_step(loader, step, set_by):
    found = ceiling_of(stage(loader, 0.001), stage(step, 2 * 100 / step * 0.9), stage(min(loader, step)))
    assert (found["images_per_second"], found["set_by"]) == (min(loader, step), set_by)


def test_the_slowest_rank_counts():
    """100 images a step: 50 each. One rank's loader makes 60 images/s, the other's 100."""
    loader = {**stage(160, ranks=2), "images_per_second_per_rank": 60.0}
    found = ceiling_of(loader, stage(400, ranks=2), stage(119), ranks=2)
    assert (found["images_per_second"], found["set_by"]) == (120, "loader")


def test_why_training_is_slower_is_said_in_figures():
    found = ceiling_of(stage(1000, 0.2), stage(250, 0.8), stage(100 / 0.7), parts(0.1, 0.6))
    assert found["set_by"] == SHARED_CORES
    assert found["images_per_second"] == pytest.approx(100 / 0.5)
    assert found["why_not"] == (
        "a step of training takes 700 ms where the ceiling has 500 ms; 100 ms of it it waits for images; its own work takes "
        "600 ms instead of 400 ms alone, beside the loader's threads on the same cores"
    )


def test_other_programs_are_a_reason():
    step, training = {**stage(250), "cores_of_others": 0.04}, {**stage(200), "cores_of_others": 1.26}
    found = ceiling_of(stage(1000), step, training, parts(0.0, 0.5))
    assert found["why_not"].endswith("other programs kept 1.3 cores busy meanwhile, 0.0 before")


def test_more_than_the_ceiling_is_no_success():
    step, training = {**stage(250), "cores_of_others": 1.26}, {**stage(300), "cores_of_others": 0.04}
    found = ceiling_of(stage(1000), step, training, parts(0.0, 1 / 3))
    assert found["training_over_ceiling"] == pytest.approx(1.2)
    assert found["why_not"].startswith("the ceiling is too low")
    assert found["why_not"].endswith("kept 1.3 cores busy beside the step alone, 0.0 in training")


def test_without_images_there_is_only_the_step():
    found = ceiling_of(None, stage(200, 0.9), None)
    assert found == {"images_per_second": 200, "set_by": "step", "training_over_ceiling": None, "why_not": None}
