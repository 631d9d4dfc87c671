"""What a run leaves beside checkpoints: ``run.json`` at its start, ``model/`` and ``adapter/`` at its end."""

from q4kd.trainer.errors import InputError, RunFolderError, for_terminal
from q4kd.trainer.files import apply_umask, sha256_file, write_json
from q4kd.trainer.made import MadeThings
from q4kd.trainer.student.lora import merged_state, save_adapter
from q4kd.trainer.train.distributed import whole_state
from q4kd.trainer.train.run.assembly import Run
from q4kd.trainer.train.run.folder import DRAFTS, kept

RUN_FILE_VERSION = 1


def write_run_file(run: Run) -> None:
    """Write ``run.json``, which says what this run is made of; exports read it."""
    student, digests = run.config.student, run.digests.as_settings()
    document = {
        "version": RUN_FILE_VERSION,
        "config": run.config.to_json(),
        "processes": run.accelerator.num_processes,
        "steps": run.total_steps,
        "data_sha256": run.data.sha256,
        "student": {
            "folder": student.name,
            "config_sha256": sha256_file(student / "config.json"),
            "sha256": digests["student_sha256"],
        },
        "teacher": run.source.describe(digests.get("teacher_sha256", "")),
    }
    write_json(run.config.out / "run.json", document)


def write_model(run: Run) -> None:
    """Write ``model/`` for transformers, and ``adapter/`` for peft with LoRA; all processes must call it together.

    Each is written under another name and renamed, so that what is there is whole and is known to be the run's own.

    Raises:
        RunFolderError: when something else has come to lie under its name since the run began.
    """
    student = run.unwrapped.student
    state = whole_state(student, run.is_main)
    if not run.is_main:
        return
    made = MadeThings(run.config.out)
    try:
        if run.adapted is not None:
            save_adapter(run.adapted, made.begin(DRAFTS["adapter"]), state)
            apply_umask(run.config.out / DRAFTS["adapter"])
            made.publish(DRAFTS["adapter"], "adapter")
            state = merged_state(run.adapted, state)
        draft = made.begin(DRAFTS["model"])
        student.save_pretrained(draft, state_dict=state, safe_serialization=True)
        run.tokenizer.save_pretrained(draft)
        apply_umask(draft)
        folder = made.publish(DRAFTS["model"], "model")
    except InputError as error:
        raise RunFolderError(f"the final model cannot be written: {error}; {kept(run.config.out)}") from error
    print(f"Model written to {for_terminal(folder)}", flush=True)
