"""The main job on a cluster of one: a small model, a local Ray head, and the batch through `ray job submit`.

Everything it makes lies under models/ and runs/ of this folder. Takes further arguments of `reprise batch`.
"""

import subprocess
import sys
import time
from pathlib import Path

from cluster.bringup import BringUpError
from cluster.cli import main as reprise
from cluster.local_ray import local_ray

HERE = Path(__file__).resolve().parent.parent
MODEL = HERE / "models" / "demo-50m"
INPUT = HERE / "examples" / "conversations" / "demo.jsonl"
OBJECT_STORE_BYTES = 2 * 1024**3
EXCLUDES = '{"excludes": [".git", ".venv", "models", "runs", "tests", "docs"]}'


def main() -> int:
    if not (MODEL / "config.json").exists():
        print(f"Making a model of 50M parameters in {MODEL.relative_to(HERE)} (once) ...", flush=True)
        code = reprise(["model", "tiny", "--out", str(MODEL), "--size", "50m", "--dtype", "bfloat16"])
        if code:
            return code
    out = HERE / "runs" / time.strftime("demo-%Y%m%d-%H%M%S")
    print("Starting a local Ray head ...", flush=True)
    try:
        with local_ray(OBJECT_STORE_BYTES) as ray_head:
            command = [
                str(Path(sys.executable).with_name("ray")),
                *("job", "submit", "--address", ray_head.dashboard_url, "--working-dir", str(HERE)),
                *("--runtime-env-json", EXCLUDES, "--"),
                *("python", "examples/batch_conversations.py", str(INPUT), "--model", str(MODEL), "--out", str(out)),
                *("--dtype", "float32", "--compare", "--concurrency", "2", "--max-new-tokens", "24"),
                *("--set", f"store.ssd_url={out / 'ssd'}", "--set", "store.ssd_bytes=4GiB"),
                *sys.argv[1:],
            ]
            print("$ " + " ".join(command), flush=True)
            code = subprocess.run(command, env=ray_head.environment, cwd=HERE, check=False).returncode
    except BringUpError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the local Ray is down", file=sys.stderr)
        return 130
    if code == 0:
        print(f"Report and rows: {out.relative_to(HERE)}/ (report.json, turns.jsonl, parquet/)")
    else:
        print(
            "demo: the job did not end well; on a machine that is very busy it may only need another try",
            file=sys.stderr,
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
