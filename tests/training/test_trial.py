"""Optimizers and schedules are tried on one weight before anything is loaded."""

import pytest
from transformers import TrainingArguments

from sandan.core.errors import UserError
from sandan.training.trial import try_optimizer, try_schedule


def arguments(tmp_path, **settings):
    return TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim": "sgd", "optim_args": "momentum=0.9,nesterov=false"},
        {"optim": "rmsprop", "optim_args": "alpha=0.9"},
        {"optim": "adafactor"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2}, "max_steps": 3},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 5000}},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 5000},
        {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1},
        {
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "eval_strategy": "steps",
            "lr_scheduler_kwargs": {"factor": 0.5},
        },
    ],
)
def test_what_would_train_is_not_refused(settings, tmp_path):
    args = arguments(tmp_path, **settings)
    try_optimizer(args)
    try_schedule(args)


@pytest.mark.parametrize(
    "settings, error",
    [
        ({"optim": "adagrad", "optim_args": "lr_decay=-1"}, ValueError),
        ({"optim": "rmsprop", "optim_args": "alfa=0.9"}, UserError),
        ({"optim": "adamw_torch", "adam_beta2": 1.0}, ValueError),
    ],
)
def test_optimizers_that_cannot_be_made(settings, error, tmp_path):
    with pytest.raises(error):
        try_optimizer(arguments(tmp_path, **settings))


@pytest.mark.parametrize(
    "name, settings, error",
    [
        ("cosine_with_restarts", {"num_cycles": None}, TypeError),
        ("polynomial", {"lr_end": -1e-3}, UserError),
        ("polynomial", {"power": "two"}, TypeError),
        ("linear", {"slope": 2}, TypeError),
        ("warmup_stable_decay", {"num_decay_steps": 10, "decay_type": "typo"}, ValueError),
        ("inverse_sqrt", {"timescale": 0}, ZeroDivisionError),
    ],
)
def test_schedules_that_cannot_be_made(name, settings, error, tmp_path):
    with pytest.raises(error):
        try_schedule(arguments(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=settings))
