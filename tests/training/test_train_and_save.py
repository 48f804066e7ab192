"""What the training stages share."""

from transformers import TrainerControl, TrainerState, TrainingArguments

from sandan.training.train_and_save import ShortProgress


class Bar:
    def __init__(self):
        self.lines = []

    def write(self, line):
        self.lines.append(line)


def test_short_progress_prints_only_what_is_watched(tmp_path):
    progress = ShortProgress(("objective/scores", "eval_objective/scores", "eps"))
    progress.training_bar = Bar()
    logs = {"loss": 1.0, "objective/scores": 0.25, "val/ratio": 1.0, "eps": 12.0}
    for one in (logs, {"train_runtime": 3.0}, {"eval_objective/scores": 0.5, "eval_runtime": 1.0}):
        progress.on_log(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), logs=one)
    assert progress.training_bar.lines == [
        "{'objective/scores': '0.25', 'eps': '12'}",
        "{'eval_objective/scores': '0.5'}",
    ]
    assert len(logs) == 4
