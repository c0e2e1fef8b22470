"""Compile prefill and the decode loop for accelerators that need not be there, tensor-parallel over the target's chips.

Prints one JSON line, last on stdout: memory, kernels, the operations that the compiled loops make, and for a GPU what
its host does: kernels it starts, copies of a mebibyte or more, and how often it waits for an answer. Numbers of the
decode loop are of one step.
TPU targets need libtpu (jax[tpu]), GPU targets the CUDA plugin (jax[cuda13]).

  aot_compile.py --target v5e-8 --model llama-3.1-8b --tokens 32768 --method fastkv
"""

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from typing import Any

from fastkv_jax.benchmarks import shapes
from fastkv_jax.benchmarks.compiled import flops, launches
from fastkv_jax.cli.flags import common
from fastkv_jax.errors import BackendError, FastKVConfigError

TPU_TARGETS = {"v5e-8": "v5e:2x4", "v5p-8": "v5p:2x2x1", "v6e-8": "v6e:2x4", "tpu7x-8": "tpu7x:2x2x1"}
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
GPU_CORES = 132  # multiprocessors, of both
GPU_TARGETS = {  # device memory, bandwidth in bytes a second
    "h100": ("NVIDIA H100 80GB HBM3", 85_014_216_704, 3_350_000_000_000),
    "h200": ("NVIDIA H200", 150_754_820_096, 4_800_000_000_000),
}
HOPPER = """gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: {cores} fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
l2_cache_size: {l2} clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{name}" """
NEW_TOKENS = 256


def parser() -> common.Parser:
    """All flags, with their ranges."""
    parser = common.Parser(prog="aot_compile.py", description=__doc__)
    parser.add_argument("--target", required=True, choices=(*TPU_TARGETS, *GPU_TARGETS))
    parser.add_argument("--model", default="llama-3.1-8b", choices=tuple(shapes.MODELS), help="default: llama-3.1-8b")
    parser.add_argument("--tokens", type=int, default=32_768, metavar="N", help="prompt length, >= 128")
    parser.add_argument("--method", default="fastkv", help="default: fastkv, with the paper's settings")
    parser.add_argument("--kernels", choices=("reference", "tpu", "gpu"), help="default: the target's")
    parser.add_argument("--kv-dtype", choices=("int8", "float8_e4m3fn"), help="default: bfloat16")
    parser.add_argument("--only", choices=("prefill", "decode"), help="one of the two programs (default: both); decode "
                        "for a GPU needs no cuDNN: jax-cuda13-plugin and nvidia-cuda-nvcc are enough")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(quiet=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return common.run(_run, parser().parse(argv))


def _run(options: argparse.Namespace) -> int:
    from fastkv_jax.methods import presets

    if options.tokens < 128:
        raise FastKVConfigError(f"tokens must be >= 128, got {options.tokens}")
    presets.check_method(options.method)
    if options.method == "asl":
        raise FastKVConfigError("method 'asl' decides on the host: it is several programs, not one")
    found = compile_for(options)
    if not options.json:
        for name in (options.only,) if options.only else ("prefill", "decode"):
            part = found if name == "prefill" else found["decode"]
            sizes = (
                f"{part['hbm_bytes_args'] / 1e9:.2f} GB arguments, {part['hbm_bytes_temp'] / 1e9:.2f} GB temporaries"
            )
            work = f"{part['compiled_flops'] / 1e12:.4g} TFLOP"
            print(f"{name:<8} {part['compile_s']:.1f} s, {sizes}, {work}, {part['kernels']}")
            if "launches" in part:
                layer, copies, trips = (part[key] for key in ("launches_a_layer", "large_copies", "host_trips"))
                print(f"{'':<8} {part['launches']:,.1f} launches, {layer} in a turn of the inner loop, "
                      f"{copies:g} copies of 1 MiB or more, {trips:g} host trips")  # fmt: skip
    print(json.dumps(found))
    return common.OK


def compile_for(options: argparse.Namespace) -> dict[str, Any]:
    """Compile both programs; bytes and compiled_flops are of one chip, flops, from the shapes, of all."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from fastkv_jax import costs
    from fastkv_jax.checkpoint.assemble import abstract_model
    from fastkv_jax.decoding.loop import CHUNK, lower_decode
    from fastkv_jax.model import sharding
    from fastkv_jax.prefilling.layers import Static
    from fastkv_jax.prefilling.passes import run_stages
    from fastkv_jax.prefilling.prompt import Prompt

    devices = _devices(options.target)
    platform = "tpu" if options.target in TPU_TARGETS else "gpu"
    kernels = options.kernels or platform
    config = shapes.config(options.model, 2 * options.tokens)
    method = _method(options.method, config.num_layers)
    mesh = Mesh(np.array(devices), ("model",), axis_types=(AxisType.Auto,)) if len(devices) > 1 else None
    place = Mesh(np.array(devices), ("model",))

    def on(a: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(place, spec))

    def heads(a: Any) -> jax.ShapeDtypeStruct:  # [L, B, N, ...]: a chip has its own heads
        spread = a.ndim >= 4 and a.shape[2] % len(devices) == 0
        return on(a, PartitionSpec(None, None, "model") if spread else PartitionSpec())

    model = jax.tree_util.tree_map_with_path(
        lambda path, a: on(a, sharding.sharding_for(place, path).spec), abstract_model(config, jnp.bfloat16, mesh)
    )
    ints = lambda *shape: on(jax.ShapeDtypeStruct(shape, jnp.int32), PartitionSpec())  # noqa: E731
    prompt = Prompt(ints(1, options.tokens), ints(1), ints(1))  # type: ignore[arg-type] - shapes stand for arrays
    static = Static(method, NEW_TOKENS, 64, platform, kernels, options.kv_dtype)
    prefill = jax.jit(lambda model, prompt: run_stages(model, prompt, None, static))
    found: dict[str, Any] = {name: getattr(options, name) for name in ("target", "model", "tokens", "method")}
    if options.only != "decode":
        with described(options.target):
            lowered = prefill.lower(model, prompt)
        found |= _compiled(lowered, platform == "gpu") | {"flops": costs.prefill_flops(config, method, options.tokens)}
    if options.only == "prefill":
        return found
    anywhere = static._replace(platform="cpu")  # shapes are the same, and need no library that attention does
    left = jax.eval_shape(lambda model, prompt: run_stages(model, prompt, None, anywhere), model, prompt)
    cache = jax.tree.map(heads, left.cache)
    slots = [segment.k.shape[0] * segment.k.shape[2] * segment.k.shape[3] for segment in cache.segments]
    operations = costs.decode_flops(config, sum(slots) * config.num_heads // config.num_kv_heads)
    with described(options.target):
        lowered = lower_decode(model, cache, kernels, lambda a: on(a, PartitionSpec()))
    found["decode"] = _compiled(lowered, platform == "gpu", CHUNK) | {"flops": operations}
    return found


def described(target: str) -> contextlib.AbstractContextManager[object]:
    """Where programs for a target are lowered: since jax 0.11 Triton asks which GPU its kernels are for."""
    if target in TPU_TARGETS:
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

    chip = AbstractDevice(GPU_TARGETS[target][0], num_cores=GPU_CORES, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("model",), (AxisType.Auto,), abstract_device=chip))


def _compiled(lowered: Any, on_gpu: bool, steps: int = 1) -> dict[str, Any]:
    """What the compiler makes of a program that takes so many steps; numbers of work are of one."""
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    text, memory = compiled.as_text(), compiled.memory_analysis()
    own = re.findall(r'%([a-z_]+)[.\d]* = [^\n]*custom_call_target="tpu_custom_call"', text)
    other = re.findall(r'custom_call_target="([^"]*(?:triton|mosaic|cudnn)[^"]*)"', text)
    found = {
        "compile_s": round(seconds, 2),
        "hbm_bytes_args": memory.argument_size_in_bytes,
        "hbm_bytes_temp": memory.temp_size_in_bytes,
        "kernels": sorted(set(own) | set(other)),
        "compiled_flops": flops.flops(text) / steps,
        "sorts": len(re.findall(r"[ =]sort\(", text)),
    }
    if not on_gpu:
        return found
    host = launches.launches(text)
    return found | {
        "launches": host.kernels / steps,
        "launches_a_layer": host.inner,
        "large_copies": host.large_copies / steps,
        "host_trips": host.host_trips / steps,
    }


def _devices(target: str) -> Sequence[Any]:
    """The chips of a target, from the compiler's own description of them."""
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_enable_compilation_cache", False)  # the time is the point
    os.environ.update(TPU_ENVIRONMENT)  # for a GPU too: a libtpu that is there must not look for chips
    try:
        if target in TPU_TARGETS:
            jax.config.update("jax_platforms", "cpu")
            return topologies.get_topology_desc(topology_name=TPU_TARGETS[target], platform="tpu").devices
        os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
        jax.config.update("jax_platforms", None)
        name, memory, bandwidth = GPU_TARGETS[target]
        l2 = 52_428_800 if target == "h100" else 62_914_560
        text = HOPPER.format(name=name, memory=memory, bandwidth=bandwidth, l2=l2, cores=GPU_CORES)
        options = {"topology": "1x1x1", "target_config": text}
        return topologies.get_topology_desc(topology_name="1x1x1", platform="cuda", **options).devices
    except Exception as error:  # what is raised depends on which plugin is missing
        needs = "jax[tpu]" if target in TPU_TARGETS else "jax[cuda13]"
        raise BackendError(f"no compiler for {target}: install {needs} ({str(error).splitlines()[0][:200]})") from error


def _method(name: str, layers: int) -> Any:
    from fastkv_jax.methods import presets

    return presets.build(name, presets.load("paper"), {}, layers)
