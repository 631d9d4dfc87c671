"""Faults in what keeps a run from deleting what is not its own, and from going on with other inputs."""

from q4kd.harness.runs.faults import Call, patch

_CHECK = "q4kd.trainer.made:MadeThings.check"
_INPUTS = "q4kd.trainer.train.run.folder:_check_inputs"
_OTHER = "q4kd.trainer.train.run.identity:explain_other_input"


@patch("checkpoint", "deleted-unseen", "what lies at the final model's name is deleted, whatever it is", _CHECK)
def _deleted_unseen(_original: Call, _self: object, *_names: object) -> None:
    return


@patch("checkpoint", "inputs-in-run-not-seen", "a run may write where its own inputs lie", _INPUTS)
def _inputs_in_run_not_seen(_original: Call, _config: object) -> None:
    return


@patch("checkpoint", "inputs-by-path", "a resumed run knows its teacher and student by their paths alone", _OTHER)
def _inputs_by_path(_original: Call, *_arguments: object) -> None:
    return
