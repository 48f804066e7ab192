"""`trl.SFTTrainer` with the guarantees of [`ReliableTrainer`]."""

from trl import SFTTrainer

from .trainer import GuardedTrlTrainer


class GuardedSFTTrainer(GuardedTrlTrainer, SFTTrainer):
    """[`trl.SFTTrainer`] that resumes exactly, stops when asked, and never steps on a number that is not finite."""
