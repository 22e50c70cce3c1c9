"""The command `ray`, for nodes that listen on 127.0.0.1 only.

Given that address, `ray start` takes another one of the machine instead, and its servers listen on all of them. It
keeps to 127.0.0.1 where it does not support several nodes, as on macOS; this makes it do both.
"""

import os


def main() -> None:
    """Do what `ray` does."""
    several_nodes = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    os.environ[several_nodes] = "1"
    # Here: Ray reads the variable when it is imported.
    from ray._private import services
    from ray.scripts.scripts import main as ray_command

    services.resolve_ip_for_localhost = lambda host: host
    os.environ[several_nodes] = "0"  # for what the node starts, jobs among it: see `servers.ray_environment`
    ray_command()  # type: ignore[no-untyped-call]  # Ray leaves it bare


if __name__ == "__main__":
    main()
