import json

from q4kd.harness.runs.experiment import Arm, Experiment, register


def command(*words):
    return lambda inputs: ["probe", "fake", *words, str(seed_file(inputs))]


def seed_file(inputs):
    return inputs.file("seed.txt", lambda path: path.write_text("7"))


def facts(run_dir, inputs):
    # Count how often this run was really executed: the tests look at it.
    with (inputs.folder / f".ran-{run_dir.name}").open("a") as file:
        file.write("x")
    out = run_dir / "out.json"
    return {"value": json.loads(out.read_text())["value"]} if out.exists() else {}


def broken_prepare(inputs):
    raise RuntimeError(f"no inputs in {inputs.folder}")


def broken_collect(run_dir, inputs):
    raise RuntimeError("cannot measure")


register(Experiment("measure", "one run", ("cpu",), (Arm(None, command(), 30),), collect=facts))
register(Experiment("compare", "two arms", ("cpu",), (Arm("a", command(), 30), Arm("b", command(), 30)), collect=facts))
register(Experiment("asleep", "ends after a minute", ("cpu",), (Arm(None, command("hang"), 90),), collect=facts))
register(Experiment("hang", "never ends", ("cpu",), (Arm(None, command("hang"), 30, stall_s=0.5),), collect=facts))
register(Experiment("unprepared", "no inputs", ("cpu",), (Arm(None, command()),), prepare=broken_prepare))
register(Experiment("unmeasured", "no facts", ("cpu",), (Arm(None, command()),), collect=broken_collect))
register(Experiment("unstarted", "no process", ("cpu",), (Arm(None, command("\0")),)))
register(Experiment("slow", "exclusive", ("cpu",), (Arm(None, command("pause"), 30),), collect=facts, exclusive=True))
register(Experiment("alone", "exclusive", ("cpu",), (Arm(None, command(), 30),), collect=facts, exclusive=True))
