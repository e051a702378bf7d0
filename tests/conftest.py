"""What every test run shares: markers that are off by default, no network, deprecations of transformers as errors."""

import gc
import logging
import os
import re
import sys

import pytest

OFF_BY_DEFAULT = ("slow", "gpu", "network", "browser")


def pytest_addoption(parser: pytest.Parser) -> None:
    for name in OFF_BY_DEFAULT:
        parser.addoption(f"--{name}", action="store_true", help=f"also run the tests marked {name}")
    parser.addoption("--method", help="of the contract, only this method")


def wanted(config: pytest.Config, name: str) -> bool:
    """Whether a marker was asked for, by its option or by name in `-m`."""
    return config.getoption(f"--{name}") or re.search(rf"(?<!not )\b{name}\b", config.getoption("-m") or "") is not None


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until everything is collected, which makes hardly any garbage
    if not wanted(config, "network"):  # read when huggingface_hub is imported, so before any test module is
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    if hasattr(config, "workerinput"):  # of pytest-xdist: several at once, a core each; read when torch is imported
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")
    sys.modules.setdefault("wandb", None)  # not to be imported: timm does, though it needs it for training only, and it takes seconds
    if wanted(config, "gpu"):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("the tests marked gpu need CUDA, torch finds no device")
    try:
        from hypothesis import settings
    except ImportError:
        return
    settings.register_profile("vtr", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("vtr")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    off, method = {name for name in OFF_BY_DEFAULT if not wanted(config, name)}, config.getoption("--method")
    deselected = [item for item in items if off & marks_of(item, method) or (method and is_of_another(item, method))]
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        gone = set(deselected)
        items[:] = [item for item in items if item not in gone]


def marks_of(item: pytest.Item, method: str | None) -> set[str]:
    """Names of the marks of a test; with `--method` what the contract asks at home is not slow."""
    found = {mark.name for mark in item.iter_markers()}
    return found - {"slow"} if method and "home" in found else found


def is_of_another(item: pytest.Item, method: str) -> bool:
    """Whether a test of the contract looks at another method."""
    callspec = getattr(item, "callspec", None)
    return item.path.name == "test_contract.py" and (callspec is None or callspec.params.get("name") != method)


def pytest_collection_finish() -> None:
    gc.enable()
    pass_over_imports()


def pass_over_imports() -> None:
    """What was imported so far stays until the end: collections, which `vtr eval` and torch ask for again and again, pass over it."""
    global passed_over
    passed_over = len(sys.modules)
    gc.collect()
    gc.freeze()


passed_over = 0


@pytest.fixture(autouse=True)
def late_imports_are_passed_over():
    """Most libraries are imported by the first test that needs them."""
    yield
    if len(sys.modules) > passed_over + 100:
        pass_over_imports()


class DeprecationIsAnError(logging.Handler):
    """transformers announces most removals by `logger.warning`, where pytest's filterwarnings does not reach."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if re.search(r"deprecat|will be removed in", message, re.IGNORECASE):
            raise FutureWarning(f"{record.name}: {message}")


@pytest.fixture(autouse=True, scope="session")
def transformers_deprecations_are_errors():
    handler = DeprecationIsAnError(level=logging.WARNING)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture
def heard():
    """Records of the root logger, as they come. pytest's own plugin for logs is off: it costs 2 ms a test, of seven thousand."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record)

    records: list[logging.LogRecord] = []
    ear = Ear()
    logging.getLogger().addHandler(ear)
    yield records
    logging.getLogger().removeHandler(ear)


@pytest.fixture
def no_gradients():
    """For modules whose tests all run without gradients."""
    import torch

    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def no_reduction_is_left_behind():
    """A test that fails inside a reduction leaves shared models as they were for the tests behind it."""

    def installed() -> set:
        reduction = sys.modules.get("vtr.reduction")
        return set(reduction._INSTALLED) if reduction is not None else set()

    before = installed()  # by fixtures of a whole module
    yield
    for left in installed() - before:
        left.remove()
