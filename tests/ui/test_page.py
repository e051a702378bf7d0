"""The page as gradio serves it, asked through gradio's own client; what the command says when it cannot start."""

import contextlib
import socket
import sys

import pytest
from PIL import Image

from tests.command_line import CliRunner
from vtr.cli import app
from vtr.ui.serve import check_port, served


@pytest.fixture
def only_this_machine(monkeypatch):
    """Connections to elsewhere fail the test."""
    elsewhere, connect = [], socket.socket.connect

    def checked(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
            raise OSError(f"no network in this test, got {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", checked)
    yield
    assert not elsewhere


def vtr_ui(*arguments, code):
    result = CliRunner().invoke(app, ["ui", *map(str, arguments)])
    assert result.exit_code == code and "Traceback" not in result.output, result.output + repr(result.exception)
    return " ".join(result.stderr.split())


def test_a_port_in_use_and_bad_options_get_a_sentence():
    with contextlib.closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"ui: cannot listen at 127.0.0.1, port {port} (address already in use); give another --port" in vtr_ui(
            "--port", port, code=2
        )
    assert check_port("127.0.0.1", 0) > 0
    assert "cannot listen at 203.0.113.1" in vtr_ui("--host", "203.0.113.1", code=2)
    assert "--methods: takes up to 3, got 4" in vtr_ui("--methods", "fastv,random,pool,uniform", code=2)
    assert "unknown method 'fast-v'; did you mean 'fastv'" in vtr_ui("--methods", "fast-v", code=2)


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "ui: the page needs gradio, which is not installed; pip install 'visual-token-reduction[ui]'" in vtr_ui(code=1)


@pytest.mark.slow
def test_a_comparison_through_the_page(session, found, tmp_path, only_this_machine):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    bad = tmp_path / "notes.png"
    bad.write_text("not a picture")
    with served(session, ["fastv"], 64) as address:
        client = Client(address, verbose=False, analytics_enabled=False)
        assert "notes.png' is not an image that Pillow can read" in client.predict([handle_file(bad)], 16, api_name="/load")[-1].replace(
            "\\", ""
        )
        with pytest.raises(AppError, match="upload: needs a picture or a video, got none"):
            client.predict("what?", ["fastv"], 64, 4, api_name="/compare")
        said = client.predict([handle_file(found.media.path)], 16, api_name="/load")[-1]
        assert "384 x 384 pixels, 576 visual tokens" in said
        with pytest.raises(AppError, match="question: must not be empty"):
            client.predict("", ["fastv"], 64, 4, api_name="/compare")
        _, answer, *rest = client.predict(found.question, ["fastv", "vcast"], 64, 4, api_name="/compare")
        assert answer == found.full.answer and "64 of 576 visual tokens" in str(rest) and "acts on the frames of videos" in str(rest)
        gone = next(token for token in range(576) if token not in found.columns[0].entry["retained"])
        picture, told, *_ = client.predict(0, 1, gone, api_name="/explain")
        assert "it is removed" in told and Image.open(picture).size == (720, 720)
        other = Client(address, verbose=False, analytics_enabled=False)
        other.predict([handle_file(found.media.path)], 16, api_name="/load")
        jobs = [one.submit(found.question, ["fastv", "vcast"], 64, 4, api_name="/compare") for one in (client, other)]  # at once
        assert [job.result()[1] for job in jobs] == [answer] * 2
        assert "65 tokens left, the answer" in client.predict(0, gone, api_name="/give_back")
        with pytest.raises(AppError, match="was not removed by any step"):
            client.predict(0, found.columns[0].entry["retained"][0], api_name="/give_back")
