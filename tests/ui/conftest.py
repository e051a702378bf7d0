"""One session with the embedded checkpoint, and one comparison, for all tests of the page."""

import pytest

from tests.embedded import random_checkpoint
from vtr.eval.examples import load_examples
from vtr.models.loading import load_model
from vtr.ui.media import open_media
from vtr.ui.session import Session, methods_for


@pytest.fixture(scope="package")
def session():
    return Session(*load_model("tiny-llava", "cpu"), "tiny-llava", "cpu")


@pytest.fixture(scope="package")
def quick():
    """A session whose weights are random and few."""
    return Session(*load_model(str(random_checkpoint()), "cpu"), str(random_checkpoint()), "cpu")


@pytest.fixture(scope="package")
def media(tmp_path_factory):
    return open_media([load_examples()[2].file], tmp_path_factory.mktemp("room"))


@pytest.fixture(scope="package")
def found(session, media):
    """FastV removes in the LLM and ranks, VisionZip merges in front of the projector, and the third needs a video."""
    methods = methods_for(["fastv", "visionzip", "vcast"], 64)
    return session.compare(media, "how many yellow objects are there?", methods, max_new_tokens=4)
