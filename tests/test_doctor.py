"""`vau doctor`: each check says what is wrong, and what to do about it."""

from pathlib import Path

import pytest

from tests.chat_server import Answer, serve
from vau_jax import cli
from vau_jax.launch import doctor


def test_every_codec_that_can_be_written_here_is_read() -> None:
    finding = doctor.decoders()
    assert finding.state == "ok" and "H.264" in finding.text and "MPEG-4" in finding.text


def test_a_broken_decoder_is_an_error_that_names_the_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    write = doctor._encode

    def damaged(path: Path, encoder: str, options: dict[str, str]) -> None:
        write(path, encoder, options)
        if encoder == "mpeg4":
            path.write_bytes(b"no video")

    monkeypatch.setattr(doctor, "_encode", damaged)
    finding = doctor.decoders()
    assert finding.state == "error" and "MPEG-4" in finding.remedy and "H.264" not in finding.remedy


def test_an_accelerator_that_jax_does_not_use_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia0").touch()
    assert doctor.devices().state == "ok"
    monkeypatch.setattr(doctor, "PLATFORMS", {f"{tmp_path}/nvidia[0-9]*": ("gpu", "cuda12")})
    finding = doctor.devices()
    assert finding.state == "error" and "pip install 'jax[cuda12]'" in finding.remedy


def test_a_folder_that_cannot_be_written_to_is_an_error() -> None:
    assert doctor.disk(Path("/proc/nowhere")).state == "error"


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "runs" / "new").state in ("ok", "warning")
    assert list(tmp_path.iterdir()) == []


def test_an_untested_version_of_jax_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.packages().state == "ok"
    monkeypatch.setattr(doctor.jax, "__version__", "0.7.1")
    assert doctor.packages().state == "warning"


def test_an_endpoint_is_asked_and_a_dead_one_named() -> None:
    with serve(lambda *_: Answer("ok")) as server:
        assert doctor.endpoint(server.url, "any").state == "ok"
    finding = doctor.endpoint(server.url, "any")
    assert finding.state == "error" and server.url in finding.text
    assert doctor.endpoint("", "").state == "skipped"


def test_an_error_gives_the_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.call(["doctor", "--quick", "--workdir=/proc/nowhere"])
    assert ended.value.code == 1
    assert any(line.startswith("error    disk") for line in capsys.readouterr().out.splitlines())
