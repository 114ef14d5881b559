"""What docs/gpu/<card>.json keeps of the results of each program."""

from xml.etree import ElementTree


def of_tests(junit: str) -> dict:
    """Of pytest's --junitxml: how many passed; the others by name, with the reason."""
    counts: dict = {"passed": 0, "failed": {}, "skipped": {}, "expected_failures": {}}
    for case in ElementTree.fromstring(junit).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        problem = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            counts["passed"] += 1
            continue
        kind = "skipped" if problem.tag == "skipped" else "failed"
        if problem.get("type") == "pytest.xfail":
            kind = "expected_failures"
        counts[kind][name] = (problem.get("message") or "").partition("\n")[0]
    return counts


def of_throughput(report: dict) -> dict:
    """Of throughput.py's report.json: rates, the step's parts, how near the hardware's limit, energy, the verdict."""
    roofline, telemetry = report["roofline"], report["telemetry"]
    config = {
        name: report["config"][name]
        for name in ("arch", "precision", "batch_size", "micro_batch", "compile", "decoder")
    }
    return {
        "config": config,
        "stages": {name: stage and stage["images_per_second"] for name, stage in report["stages"].items()},
        "step_parts": {name: part and part["median"] for name, part in report["step_parts"].items()},
        "compile_seconds": report["warm_up"]["compile_seconds"],
        "ceiling": report["ceiling"],
        "peaks": roofline["peaks"],
        "mfu": roofline["mfu"],
        "images_per_joule": roofline["images_per_joule"],
        "power_watts": [device["fields"]["power_watts"] for device in telemetry["devices"]],
        "verdict": {name: report["verdict"][name] for name in ("bound", "sentence", "evidence")},
    }


def of_inputs(result: dict) -> dict:
    return {name: result[name] for name in ("batch_size", "threads", "rounds", "inputs")}


def of_steps(result: dict) -> dict:
    return {name: result[name] for name in ("batch_size", "rounds", "steps")}


def of_loaders(result: dict) -> dict:
    return {name: result[name] for name in ("images", "batch_size", "threads", "rounds", "scales")}
