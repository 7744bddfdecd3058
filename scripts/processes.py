"""How many processes where: from the environment and an accelerate config to a `Plan`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train_cc.io.errors import InputError
from train_cc.io.processes import devices_listed, gpus_shown, number
from train_cc.io.read import parsing

MOST_ON_A_NODE = 256
# Sections of an accelerate config that ask for what this project does not do.
NOT_DONE = ("deepspeed_config", "megatron_lm_config", "dynamo_config", "parallelism_config", "fp8_config", "tpu_config")


@dataclass
class Plan:
    """``processes`` over all nodes; ``environment``: what is handed on to each."""

    processes: int
    nodes: int = 1
    rank: int = 0
    address: str = ""
    port: int = 29500
    environment: dict[str, str] = field(default_factory=dict)


def visible_gpus(environment: Mapping[str, str]) -> int:
    listed = devices_listed(environment)
    return len(gpus_shown() if listed is None else listed)


def read_config(path: Path) -> dict:
    """An accelerate config. Raises `InputError` for one that asks for what is not done here."""
    import yaml

    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        there = " ".join(sorted(map(str, Path("scripts/accelerate").glob("*.yaml"))))
        raise InputError(f"ACCELERATE_CONFIG is {path}, which {kind}; there are: {there}")
    expected = "an accelerate config, such as those in scripts/accelerate/,"
    with parsing(path, expected):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"{path} is no mapping; {expected} is expected")
    kind = str(config.get("distributed_type", "NO"))
    if kind not in ("NO", "False", "MULTI_GPU", "MULTI_CPU", "FSDP"):
        raise InputError(f"{path}: distributed_type is {kind}; allowed: NO, MULTI_GPU, MULTI_CPU, FSDP")
    asked = [name for name in NOT_DONE if config.get(name)]
    if asked:
        raise InputError(f"{path} has {', '.join(asked)}, which nothing here follows: remove it (--compile compiles)")
    precision = str(config.get("mixed_precision") or "no").lower()  # an unquoted no is False
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"{path}: mixed_precision is {precision}; allowed: no, fp16, bf16")
    fsdp = config.get("fsdp_config") or {}
    if not isinstance(fsdp, dict):
        raise InputError(f"{path}: fsdp_config is {fsdp}; a mapping is expected")
    return config | {"mixed_precision": precision, "sharded": kind == "FSDP", "fsdp_config": fsdp}


def handed_on(config: dict, environment: Mapping[str, str]) -> dict[str, str]:
    """What accelerate's own launcher would set for its config, as far as it means something here."""
    variables = {
        "ACCELERATE_MIXED_PRECISION": config["mixed_precision"],
        "ACCELERATE_USE_FSDP": str(config["sharded"]).lower(),
        "FSDP_VERSION": str(config["fsdp_config"].get("fsdp_version", 2)),
    }
    if config.get("use_cpu") is True:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif config.get("gpu_ids", "all") != "all" and "CUDA_VISIBLE_DEVICES" not in environment:
        listed = config["gpu_ids"]
        listed = listed if isinstance(listed, list) else [listed]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, listed))
    return variables


def make_plan(environment: Mapping[str, str], only_shown: bool = False) -> Plan:
    """Raises `InputError` for numbers that cannot be and, unless ``only_shown``, for what nodes lack to meet."""
    config, variables = {}, {}
    if environment.get("ACCELERATE_CONFIG"):
        config = read_config(Path(environment["ACCELERATE_CONFIG"]))
        variables = handed_on(config, environment)
    gpus = visible_gpus(environment | variables)
    nodes = number(environment, "NUM_NODES", 1, 10_000, config.get("num_machines", 1))
    # Our own configs name no number. Without GPUs another one's, meant for GPUs, says nothing.
    usual = (config.get("num_processes") or gpus * nodes) if gpus else nodes
    processes = number(environment, "NUM_PROCESSES", 1, nodes * MOST_ON_A_NODE, usual)
    if processes % nodes:
        raise InputError(f"NUM_PROCESSES is {processes}; allowed: a multiple of the {nodes} nodes")
    plan = Plan(processes, nodes, environment=variables | {"NUM_PROCESSES": str(processes)})
    if nodes > 1 and not only_shown:
        plan.address = environment.get("MAIN_ADDRESS") or str(config.get("main_process_ip") or "")
        if not plan.address:
            raise InputError("MAIN_ADDRESS is missing: the address of node 0, for the others to meet there")
        if not environment.get("NODE_RANK"):
            raise InputError(f"NODE_RANK is missing: the number of this node, 0 to {nodes - 1}")
        plan.rank = number(environment, "NODE_RANK", 0, nodes - 1, "")
        plan.port = number(environment, "MAIN_PORT", 1, 65535, config.get("main_process_port") or 29500)
    return plan
