"""The number of processes and their nodes: from the environment and an accelerate config to a `Plan`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.processes import count_of, devices_listed, gpus_shown
from train_cc.io.read import parsing

MOST_ON_A_NODE = 256
CONFIG = "an accelerate config, such as those in scripts/accelerate/,"
# Sections of an accelerate config that ask for what this project does not do.
NOT_DONE = ("deepspeed_config", "megatron_lm_config", "dynamo_config", "parallelism_config", "fp8_config", "tpu_config")


@dataclass(frozen=True)
class Plan:
    """``processes`` over all nodes; ``environment``: variables of each."""

    processes: int
    nodes: int
    environment: dict[str, str]
    rank: int = 0
    address: str = ""
    port: int = 29500


def visible_gpus(environment: Mapping[str, str]) -> int:
    listed = devices_listed(environment)
    return len(gpus_shown() if listed is None else listed)


def read_config(path: Path) -> tuple[dict, dict[str, str]]:
    """An accelerate config, and the variables that accelerate's own launcher would set, as far as they count here.

    Raises `InputError` for a config that asks for what is not done here.
    """
    import yaml

    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise InputError(f"ACCELERATE_CONFIG is {path}, which {kind}; {CONFIG} is expected")
    with parsing(path, CONFIG):
        config = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        fsdp = dict(config.get("fsdp_config") or {})
    if unused := [name for name in NOT_DONE if config.get(name)]:
        raise InputError(f"{path} has {', '.join(unused)}, which nothing here follows: remove it (--compile compiles)")
    kind = str(config.get("distributed_type", "NO"))
    precision = str(config.get("mixed_precision") or "no").lower()  # an unquoted no is False
    for name, value, allowed in (
        ("distributed_type", "NO" if kind == "False" else kind, ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")),
        ("mixed_precision", precision, ("no", "fp16", "bf16")),
    ):
        if value not in allowed:
            raise InputError(f"{path}: {name} is {value}; allowed: {', '.join(allowed)}")
    variables = {"ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_FSDP": str(kind == "FSDP").lower()}
    return config, variables | {"FSDP_VERSION": str(fsdp.get("fsdp_version", 2))}


def make_plan(environment: Mapping[str, str], dry: bool = False) -> Plan:
    """Raises `InputError` for numbers that cannot be and, unless ``dry``, for what nodes lack to meet."""
    config, variables = {}, {}
    if path := environment.get("ACCELERATE_CONFIG"):
        config, variables = read_config(Path(path))
    if config.get("use_cpu") is True:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif config.get("gpu_ids", "all") != "all" and "CUDA_VISIBLE_DEVICES" not in environment:
        listed = config["gpu_ids"]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, listed if isinstance(listed, list) else [listed]))
    gpus = visible_gpus(environment | variables)
    nodes = count_of(environment, "NUM_NODES", 1, 10_000, config.get("num_machines", 1))
    # Our own configs name no number. Without GPUs another one's, meant for GPUs, says nothing.
    usual = (config.get("num_processes") or gpus * nodes) if gpus else nodes
    processes = count_of(environment, "NUM_PROCESSES", 1, nodes * MOST_ON_A_NODE, usual)
    if processes % nodes:
        raise InputError(f"NUM_PROCESSES is {processes}; allowed: a multiple of the {nodes} nodes")
    plan = processes, nodes, variables | {"NUM_PROCESSES": str(processes)}
    if nodes == 1 or dry:
        return Plan(*plan)
    address = environment.get("MAIN_ADDRESS") or str(config.get("main_process_ip") or "")
    if not address:
        raise InputError("MAIN_ADDRESS is missing: the address of node 0, for the others to meet there")
    if not environment.get("NODE_RANK"):
        raise InputError(f"NODE_RANK is missing: the number of this node, 0 to {nodes - 1}")
    rank = count_of(environment, "NODE_RANK", 0, nodes - 1, "")
    return Plan(
        *plan, rank, address, count_of(environment, "MAIN_PORT", 1, 65535, config.get("main_process_port") or 29500)
    )
