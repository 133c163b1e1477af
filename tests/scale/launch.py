"""Launch a worker as torchrun does, on two ranks, from one process that imports PyTorch and the worker once.

    launch.py WORKER ARGUMENT ...

The agent, the rendezvous and the store are those of `torchrun --standalone --nproc-per-node 2`. The ranks are forks of
this process, so that they do not import PyTorch again. It ends with 1 if a rank fails.
"""

import importlib.util
import sys
import traceback
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def ranked(main, arguments):
    """Run `main` on this rank, and show its error before the agent ends the other rank."""
    try:
        main(*arguments)
    except BaseException:
        traceback.print_exc()
        raise


def launch(worker, arguments):
    """Return whether all ranks ended well."""
    spec = importlib.util.spec_from_file_location(worker.stem, worker)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, ranked)(module.main, arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    sys.exit(0 if launch(Path(sys.argv[1]), sys.argv[2:]) else 1)
