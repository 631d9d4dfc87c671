import os
import signal

from q4kd.harness.runs.faults import Fault, register, replace


def _inflate():
    replace("fakeworld.program:measured", lambda original: lambda: 10 * original())


def _harmless():
    replace("fakeworld.program:measured", lambda original: lambda: original())


def _absent():
    replace("fakeworld.program:gone", lambda original: original)


def _forgets():
    pass


def _breaks():
    raise RuntimeError("cannot plant")


def _crash():
    replace("fakeworld.program:measured", lambda original: lambda: 1 / 0)


def _die():
    def make(original):
        return lambda: os.kill(os.getpid(), signal.SIGKILL) or 0

    replace("fakeworld.program:ending", make)
    replace("fakeworld.program:measured", lambda original: lambda: 99)


M, E = "fakeworld.program:measured", "fakeworld.program:ending"
register(Fault("inflate", "measures ten times too much", "loss", (M,), _inflate))
register(Fault("inflate-b", "the same, in arm b only", "loss", (M,), _inflate, arms=("b",)))
register(Fault("harmless", "changes nothing", "loss", (M,), _harmless))
register(Fault("absent", "patches what is not there", "loss", ("fakeworld.program:gone",), _absent))
register(Fault("forgets", "declares a target that it leaves alone", "loss", (M,), _forgets))
register(Fault("breaks", "cannot be planted", "loss", (M,), _breaks))
register(Fault("crash", "crashes the program", "supervision", (M,), _crash))
register(Fault("die", "kills the program at its end", "supervision", (M, E), _die, None, ("killed_cause_unknown",)))
register(Fault("die-undeclared", "the same, not declared", "supervision", (M, E), _die))
