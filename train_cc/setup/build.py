"""A run from the command line: networks, judges, rewards, optimizers, each placed on its device and compiled."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train_cc.distillation import turns
from train_cc.distillation.run import FullScores, LoraScores, Run, trainable
from train_cc.distillation.state import parts_of
from train_cc.draws import Draws
from train_cc.io.class_names import dataset_of
from train_cc.io.errors import InputError
from train_cc.io.fields import of, replaced
from train_cc.io.remote import hub_name, model_folder
from train_cc.io.weights import GENERATION_CONFIG
from train_cc.models.backbone import CODE, Network, choose_attention, config_of, trust_code
from train_cc.models.estimator import CHECKED_STEPS, MARGIN, FullEstimator, ScoreEstimator, overflowing
from train_cc.models.generator import GenerationConfig, build_generator, generator_lora_rank
from train_cc.models.lora import hold_frozen_in
from train_cc.models.networks.sit import SiTBlock
from train_cc.models.vae import require_decoder
from train_cc.rewards.build import Fit, Networks, build_rewards, judges_sha256, place_judge
from train_cc.rewards.spec import rewards_of
from train_cc.rewards.terms import Reward, Scorer
from train_cc.run.session import COMPUTE_DTYPES, Learner, Session
from train_cc.run.states import Average
from train_cc.samplers import euler_sample
from train_cc.settings import Method, Optimisation, Output

CHECK = 5  # first key of the draws, after the seed, of the batch that users' functions and fp16 are checked on
SAMPLED = 4  # samples that decoder and judges are checked on in fp16


def learner_of(session: Session, accelerator: Accelerator, network: nn.Module, name: str, how: Optimisation) -> Learner:
    """``network`` on its device and over the processes, with its optimizer: AdamW in one fused kernel, or torchao's.

    ``name`` chooses the network's own rate, decay and first beta among the settings.
    """
    # Placed first: sharding replaces the parameters, and the optimizer belongs to those that are trained.
    network = session.place(accelerator, network)
    beta1 = getattr(how, f"adam_beta1_{name}", None)
    options = {
        "lr": getattr(how, f"learning_rate_{name}"),
        "betas": (how.adam_beta1 if beta1 is None else beta1, how.adam_beta2),
        "eps": how.adam_epsilon,
        "weight_decay": getattr(how, f"weight_decay_{name}", 0.0),
    }
    if how.optimizer == "adamw8bit":
        from torchao.optim import AdamW8bit

        optimizer = AdamW8bit(trainable(network).values(), **options)
    else:
        optimizer = torch.optim.AdamW(trainable(network).values(), fused=True, **options)
    return Learner(accelerator, network, accelerator.prepare_optimizer(optimizer))


def folder_of_teacher(args: argparse.Namespace) -> Path:
    """A name on the hub is a folder of its cache; in a dry run the folder may be missing."""
    return model_folder(args.teacher) if hub_name(args.teacher) else args.teacher


def load_teacher(args: argparse.Namespace, session: Session, networks: Networks) -> tuple[Network, dict, int]:
    """Return the teacher, its config, and the channels of an image. Raises `InputError` if other flags do not fit."""
    if args.trust_teacher_code:
        trust_code(args.teacher)
    steps = GenerationConfig.read(folder_of_teacher(args)).num_inference_steps  # generators' folders record them
    if steps is not None and not args.teacher_is_distilled:
        raise InputError(
            f"--teacher {args.teacher} is a distilled generator: its {GENERATION_CONFIG} records {steps} "
            "step(s) of inference. A multi-step teacher is expected, whose velocity holds at all times. If this one is "
            "meant: --teacher-is-distilled"
        )
    teacher = networks.teacher(args.teacher)
    config = config_of(teacher)
    if teacher.needs and session.generator_accelerator.mixed_precision == "bf16":
        raise InputError(
            f"--mixed-precision bf16: {args.teacher} is a {type(teacher).__name__}, and {teacher.needs}; "
            "allowed: no, fp16"
        )
    if args.num_classes not in (None, config["num_classes"]):
        raise InputError(f"--num-classes is {args.num_classes}, but {args.teacher} has {config['num_classes']} classes")
    return teacher, config, require_decoder(config["in_channels"], args.vae, args.teacher)


def prepare_scores(estimator: ScoreEstimator, source: Path, session: Session, dtype: torch.dtype) -> None:
    """On a GPU the frozen weights are held, and the scores computed, in fp16 where it does not overflow, else bf16.

    Sharded weights are gathered in the compute dtype only. Raises `InputError` where fp16 was asked for and overflows.
    """
    if session.device.type == "cpu" or dtype == torch.float32 or (session.sharded and dtype != torch.float16):
        return
    where = estimator.to(session.device).overflowing_block(torch.float16, session.device)
    if where is not None and dtype == torch.float16:
        raise_overflow(where, source)
    elif where is not None:
        session.notes.append(f"fp16 overflows in {where} of {source}: scores are computed in bf16")
    elif not session.sharded:
        hold_frozen_in(estimator, torch.float16)
        estimator.score_dtype = torch.float16


def raise_overflow(where: str, source: object) -> None:
    most = f"its largest value is beyond {torch.finfo(torch.float16).max / MARGIN:.0f}, a quarter of the range"
    raise InputError(f"fp16 overflows in {where} of {source} ({most}): take --mixed-precision bf16, or no")


@torch.no_grad()
def require_range(
    args: argparse.Namespace,
    estimator: ScoreEstimator,
    judges: dict[str, nn.Module],
    rewards: list[Reward],
    decode: Callable[[Tensor], Tensor],
    fit: Fit,
) -> None:
    """Decoder, judges and feature spaces bear fp16, if they compute in it, on a few samples of the teacher.

    Raises `InputError` that names the network and its layer.
    """
    networks: dict[str, Callable] = {f"the decoder {args.vae}": decode}
    networks |= {f"the {name.replace('_', ' ')}": judge for name, judge in judges.items()}
    networks |= {f"the reward {r.name}": r.memory.features_of for r in rewards if r.memory is not None}
    modules = {name: each for name, each in networks.items() if isinstance(each, nn.Module)}
    halves = {name: each for name, each in modules.items() if any(w.dtype == torch.float16 for w in each.parameters())}
    if not halves:
        return
    device = next(estimator.parameters()).device
    noise = Draws(0, CHECK, device=device).noise(SAMPLED, *estimator.network.sample_shape)
    y = torch.arange(SAMPLED, device=device) % fit.num_classes
    x0 = euler_sample(estimator.adapted, noise, y, CHECKED_STEPS).to(fit.device)
    images = decode(x0)
    for name, network in halves.items():
        if where := overflowing(network, torch.float16, partial(network, x0 if network is decode else images)):
            raise_overflow(where, name)


def prepare_network(
    network: nn.Module, args: argparse.Namespace, device: torch.device, dtype: torch.dtype, compiled: bool
) -> None:
    """Frozen weights in the compute dtype, the attention that is fast, recomputation and compilation as asked.

    ``network``: the generator or the estimator. What is trained stays fp32: an Adam step at 2e-5 is below half a unit
    in the last place of bf16.
    """
    hold_frozen_in(network, getattr(network, "score_dtype", None) or dtype)
    choose_attention(network, device, dtype)
    blocks = network.blocks
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    else:
        for module in blocks.modules():  # a frozen layer keeps nothing of its input
            if hasattr(module, "recompute"):
                module.recompute = module.fc2.weight.requires_grad
    if compiled:
        for block in blocks:  # one graph for all of them: compile time does not grow with the depth
            block.compile()


def check_functions(
    scorers: list[Scorer], decode: Callable[[Tensor], Tensor], shape: tuple[int, int, int], fit: Fit
) -> None:
    """Each of a user's functions on one batch, before anything is written. Raises `InputError`."""
    if checks := [scorer.check for scorer in scorers if scorer.check is not None]:
        y = torch.arange(2, device=fit.device) % fit.num_classes
        with torch.no_grad():
            images = decode(Draws(0, CHECK, device=fit.device).noise(2, *shape))
        for check in checks:
            check(images, y)


def fit_of(args: argparse.Namespace, session: Session, networks: Networks, num_classes: int, channels: int) -> Fit:
    """The generator, images and device that rewards must fit."""
    device, dtype = session.device, COMPUTE_DTYPES[session.generator_accelerator.mixed_precision]
    own = {"num_classes": num_classes, "channels": channels, "device": device, "dtype": dtype, "networks": networks}
    own["dataset"] = None if hub_name(args.teacher) else dataset_of(args.teacher)
    return of(Fit, args, **own, reduce=session.total, checkpointing=args.reward_checkpointing)


def load_decode(
    args: argparse.Namespace, session: Session, fit: Fit, rewarded: bool, latents: str | None
) -> Callable[[Tensor], Tensor]:
    """x0 -> images. Without previews and rewards nothing is decoded, or loaded."""
    decoded = args.vae != "none" and (args.num_previews or rewarded or args.tilt)
    decode = fit.networks.decoder(args.vae if decoded else None, fit.device, fit.dtype, latents)
    if isinstance(decode, nn.Module):  # pixel space has no decoder network
        if decode.needs_fp32 and fit.dtype == torch.float16:
            session.notes.append(
                f"--vae {args.vae}: its config.json has force_upcast, so images are decoded in fp32, not fp16; "
                "write false there if its activations are known to fit fp16"
            )
        if args.reward_checkpointing and rewarded:
            decode.enable_gradient_checkpointing()
    return decode


def build(args: argparse.Namespace, session: Session, networks: Networks | None = None) -> Run:
    """Load the teacher twice: as the estimator's frozen base, and as the generator's start."""
    networks = networks or Networks(session)
    compiled = compiler_works(args.compile, session)  # before anything is loaded
    how = of(Optimisation, args)
    teacher, config, channels = load_teacher(args, session, networks)
    fit = fit_of(args, session, networks, config["num_classes"], channels)
    rewards, tilts = build_rewards(rewards_of(args), args.tilt, fit)
    scorers: list[Scorer] = [*rewards, *tilts]
    judges = {f"reward_{scorer.name}": scorer.judge for scorer in scorers if scorer.judge is not None}
    files = {"teacher": teacher.files} | {name: paths for each in scorers for name, paths in each.files.items()}
    files |= {"teacher_code": [args.teacher / CODE]} if teacher.code_sha256 else {}
    if args.gan_data and Path(args.gan_data).is_file():
        files["gan_data"] = [Path(args.gan_data)]
    if args.holdout_classifier:  # rewards nothing, and shows reward hacking
        judges["holdout"] = place_judge(networks.classifier(args.holdout_classifier), "holdout", fit)
        files["holdout_classifier"] = judges["holdout"].files
    sample_shape = teacher.sample_shape
    if args.fake_score == "full":
        roles, estimator = FullScores, FullEstimator(networks.teacher(args.teacher), teacher)
    else:
        roles, estimator = LoraScores, ScoreEstimator(teacher, args.lora_rank, args.lora_init_spread, args.seed)
    # Before the generator is loaded: never two copies in fp32.
    prepare_scores(estimator, args.teacher, session, fit.dtype)
    generation = GenerationConfig.read(folder_of_teacher(args))
    session.notes += [note for scorer in scorers for note in scorer.notes]
    decode = load_decode(args, session, fit, bool(rewards), generation.latent_space_sha256)
    files |= {"vae": decode.files} if isinstance(decode, nn.Module) else {}
    if networks.have_values:
        require_range(args, estimator, judges, rewards, decode, fit)
        check_functions(scorers, decode, sample_shape, fit)
    if session.sharded:
        estimator.cpu()  # sharding moves it again, when there is room for it
    prepare_network(estimator, args, fit.device, fit.dtype, compiled)
    rank = generator_lora_rank(args.use_lora_gen, args.lora_rank)
    generator = build_generator(networks.teacher(args.teacher), rank, args.seed)
    prepare_network(generator, args, fit.device, fit.dtype, compiled)
    hashes = networks.hashes(files)
    one, two = session.generator_accelerator, session.estimator_accelerator
    learners = {
        "generator": learner_of(session, one, generator, "generator", how),
        "estimator": learner_of(session, two, estimator, "estimator", how),
    }
    run = Run(
        session=session,
        method=of(Method, replaced(args, lora_scale_real=0.0) if roles is FullScores else args),
        optimisation=how,
        output=of(Output, args),
        learners=learners,
        ema=Average.of(trainable(learners["generator"].plain), args.ema_decay) if args.ema_decay else None,
        decode=decode,
        model_config=config,
        teacher=args.teacher,
        roles=roles,
        latent_space=generation.latent_space_sha256,
        rewards=rewards,
        tilts=tilts,
        reward_micro_batch=args.reward_micro_batch,
        judges=judges,
        lora_rank_generator=rank,
        arguments=json.loads(json.dumps(vars(args), default=str)),
        # Of a teacher that is a rewarded generator, those too.
        rewards_sha256={*(generation.rewards_sha256 or ()), *judges_sha256(scorers, hashes)},
        hashes=hashes,
    )
    run.generator_terms, run.estimator_terms = [turns.matching, turns.rewards], [turns.velocity_matching]
    if args.gan_weight or args.gan_data:
        from train_cc.distillation.gan import build_gan  # with what reads images

        gan, head = build_gan(run, args.gan_data, args.vae, networks.have_values)
        run.learners["gan"] = learner_of(session, two, head, "gan", how)
        run.generator_terms.append(gan.fool)
        run.estimator_terms.append(gan.tell_apart)
    run.parts = parts_of(run)
    return run


# The compiler --------------------------------------------------------------------------------------------------------


RECOMPILE_LIMIT = 64  # both networks, with and without gradient, autocast, batch sizes; torch's own is 8


def configure_compiler() -> None:
    """Blocks are compiled whole, and for every case that a run has, rather than left uncompiled from some point on.

    DDP would have torch cut a block's graph at the ends of its buckets; gradients of one block after another overlap
    with their reduction without that. Small kernels that do not wait for one another, such as the casts of weights,
    become one where that is faster by the card's own clock.
    """
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._inductor.config.combo_kernels = True
    torch._inductor.config.benchmark_combo_kernel = True


def require_compiler() -> None:
    """Compile and run a small block of the networks, forward and backward, under autocast, at two batch sizes.

    Raises `InputError` if `torch.compile` cannot do it on this machine.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = SiTBlock(hidden_size=64, num_heads=2, mlp_ratio=4.0).to(device)
    try:
        compiled = torch.compile(lambda x: block(x, x.mean(dim=1)))
        for batch in (2, 3):
            x = torch.zeros(batch, 16, 64, device=device, requires_grad=True)
            with torch._dynamo.config.patch(suppress_errors=False), torch.autocast(device):
                out = compiled(x)
            out.float().sum().backward()
    except Exception as error:  # whatever the missing piece raises
        words = " ".join(str(error).strip().splitlines()[:2])
        missing = "Triton" if device == "cuda" else "a C++ compiler such as g++"
        raise InputError(
            f"--compile found no working compiler on this machine: {missing} is needed, and did not compile a small "
            f"block, forward and backward. Install it, or leave --compile away ({type(error).__name__}: {words})"
        ) from error


def compiler_works(flag: bool | str, session: Session) -> bool:
    """True if blocks are compiled, as ``flag``: "auto" is only on CUDA, if a compiler is found; else the log says so.

    Raises `InputError` where it was asked for, and there is none.
    """
    if not flag or (flag == "auto" and session.device.type != "cuda"):
        return False
    configure_compiler()
    try:
        require_compiler()
    except InputError as error:
        if flag != "auto":
            raise
        session.notes.append(f"WARNING: nothing is compiled, and every update takes longer: {error}")
        return False
    torch._dynamo.config.suppress_errors = flag == "auto"  # a block that cannot be compiled runs as it is
    return True
