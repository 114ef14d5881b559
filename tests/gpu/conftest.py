"""What needs a GPU: collected everywhere, skipped where there is none. python -m pytest tests/gpu

A test with a parameter `device` runs for the CPU anywhere, so that what it does is tried where nobody has a GPU.
"""

import pytest
import torch


def pytest_runtest_setup(item):
    device = item.callspec.params.get("device") if hasattr(item, "callspec") else None
    if device != torch.device("cpu") and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false")


@pytest.fixture(autouse=True)
def settings_stay():
    """What a test sets for the whole process is as before afterwards."""
    matmul = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    yield
    if not torch.cuda.is_available():
        return
    torch.cuda.set_sync_debug_mode("default")
    torch._dynamo.reset()
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn
