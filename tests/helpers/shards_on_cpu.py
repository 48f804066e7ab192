"""Be a script whose processes shard on the CPU: `accelerate launch ... tests/helpers/shards_on_cpu.py scripts/pretrain.py ...`.

accelerate 1.15 leaves FSDP and DeepSpeed off where all processes are on the CPU (`AcceleratorState.__init__` asks for
MULTI_GPU and the like): here it is told that they are not. Device and backend stay the CPU and gloo.
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_here() -> None:
    before = AcceleratorState.__init__

    def init(self, mixed_precision=None, cpu=False, *args, **kwargs):
        if not AcceleratorState._shared_state:
            assert PartialState().device.type == "cpu"
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        before(self, mixed_precision, False, *args, **kwargs)

    AcceleratorState.__init__ = init


if __name__ == "__main__":
    shard_here()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
