"""The command `ray`, for nodes that listen on 127.0.0.1 only.

Given that address, `ray start` replaces it by another address of the machine, and its servers listen on all of them.
Only where Ray does not support several nodes, as on macOS, it keeps 127.0.0.1. This script keeps 127.0.0.1 and still
allows several nodes.
"""

import os


def main() -> None:
    """Run the command `ray`."""
    several_nodes = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    os.environ[several_nodes] = "1"
    # Imported only here, because Ray reads the variable when it is imported.
    from ray._private import services
    from ray.scripts.scripts import main as ray_command

    services.resolve_ip_for_localhost = lambda host: host
    os.environ[several_nodes] = "0"  # for processes of the node, such as jobs: see `servers.ray_environment`
    ray_command()  # type: ignore[no-untyped-call]  # Ray does not annotate it


if __name__ == "__main__":
    main()
