"""What rank 0 finds, for all."""

import pytest
from processes import run_ranks

from pipehc.comm.first import from_first


def everyone(rank, fails):
    def work():
        if rank:
            raise AssertionError("only rank 0 does it")
        if fails:
            raise fails
        return {"by": rank}

    with pytest.raises(ValueError) if fails else pytest.MonkeyPatch.context() as caught:
        return from_first(work)
    return str(caught.value)


@pytest.mark.parametrize(
    ("fails", "found"),
    [(None, {"by": 0}), (ValueError("no such thing"), "no such thing"), (KeyError("x"), "KeyError('x')")],
    ids=str,
)
def test_every_rank_gets_what_rank_0_found_or_its_error(fails, found):
    assert run_ranks(everyone, 3, fails) == [found] * 3
