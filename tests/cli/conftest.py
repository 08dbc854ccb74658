import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are faster without threads, above all beside other processes."""
    torch.set_num_threads(1)
