"""How commands end, and what they say then."""

import errno
from collections.abc import Callable

import pytest

from neomoba_dist.config import ConfigError
from neomoba_dist.errors import CANCELLED, FAILED, MISTAKE, exit_code_of
from neomoba_dist.parallel.ledger import CommunicationError


def raises(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("x.json: no such file"), MISTAKE, "error: x.json: no such file\n"),
        (CommunicationError("rank 1 is gone"), FAILED, "error: rank 1 is gone\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), MISTAKE, "error: [Errno 2] No such file: 'x'\n"),
        (OSError(errno.ENOSPC, "No space left", "x"), FAILED, "error: [Errno 28] No space left: 'x'\n"),
        (KeyboardInterrupt(), CANCELLED, "interrupted\n"),
    ],
)
def test_errors_for_users(error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(raises(error)) == code
    assert capsys.readouterr().err == said


def test_a_defect_keeps_its_stack() -> None:
    with pytest.raises(ZeroDivisionError):
        exit_code_of(raises(ZeroDivisionError()))


@pytest.mark.parametrize(("given", "code"), [(None, 0), (0, 0), (FAILED, FAILED)])
def test_what_a_command_returns(given: int | None, code: int) -> None:
    assert exit_code_of(lambda: given) == code


@pytest.mark.parametrize(("error", "said"), [(ConfigError("x"), ""), (CommunicationError("x"), "error: rank 3: x\n")])
def test_another_rank_says_what_failed_only(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 3)
    exit_code_of(raises(error))
    assert capsys.readouterr().err == said
