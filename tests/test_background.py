"""Work beside the work: order, no more than one at a time, and errors that are not lost."""

import threading
import time

import pytest

from utils.background import Beside


def test_functions_run_beside_the_caller_one_at_a_time_and_in_order():
    gate, seen = threading.Event(), []
    with Beside() as beside:
        beside.begin(lambda: (gate.wait(5), seen.append("first")))
        seen.append("caller")  # did not wait
        threading.Timer(0.05, gate.set).start()
        beside.begin(seen.append, "second")  # waits for the first
        assert seen[:2] == ["caller", "first"]
    assert seen == ["caller", "first", "second"]


def fail() -> None:
    raise OSError("no space")


def test_an_error_is_raised_by_the_next_call():
    begun = []
    with pytest.raises(OSError, match="no space"), Beside() as beside:
        beside.begin(fail)
        time.sleep(0.01)
        beside.begin(begun.append, 1)
    assert not begun


def test_an_error_of_the_last_is_raised_at_the_end():
    with pytest.raises(OSError, match="no space"), Beside() as beside:
        beside.begin(fail)


def test_an_error_of_the_caller_lets_the_last_one_end():
    seen = []
    with pytest.raises(ValueError, match="elsewhere"), Beside() as beside:
        beside.begin(lambda: (time.sleep(0.05), seen.append(1)))
        raise ValueError("elsewhere")
    assert seen == [1]


def test_waiting_tells_whether_something_ran():
    gate = threading.Event()
    with Beside() as beside:
        assert not beside.wait()
        beside.begin(gate.wait, 5)
        threading.Timer(0.05, gate.set).start()
        assert beside.wait() and not beside.wait()


def test_the_thread_is_prepared_once():
    prepared = []
    with Beside(lambda: prepared.append(threading.get_ident())) as beside:
        for _ in range(2):
            beside.begin(lambda: prepared.append(threading.get_ident()))
    assert len(prepared) == 3 and len(set(prepared)) == 1 and prepared[0] != threading.get_ident()
