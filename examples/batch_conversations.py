"""The main job as a Ray job:

    ray job submit --working-dir . -- python examples/batch_conversations.py INPUT --model MODEL --out DIR

Takes the arguments of `reprise batch` (try --help). The job runs in an unpacked copy of the working directory, so give
absolute paths or URLs for the input, the model and the output.
"""

import sys

try:
    from cluster.cli import main
except ImportError as error:
    sys.exit(
        f"reprise: {error}\n"
        "If the job's working directory has a folder named actors/, cluster/, policies/ or storage/ of its own, it "
        "hides Reprise's package of that name: rename it, or submit from another directory."
    )

if __name__ == "__main__":
    sys.exit(main(["batch", *sys.argv[1:]]))
