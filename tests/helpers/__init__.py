"""What several test modules share; no test module imports another one."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
TEXTS = ("The cow eats grass.", "The frog lives in the pond.", "牛は草を食べます。", "蛙は池に住んでいます。")
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}
