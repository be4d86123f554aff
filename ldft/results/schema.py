"""The row's columns: name, type, unit and description of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from ldft.config import columns as config_columns

SCHEMA_VERSION = 1
ROW_FILE = "row.parquet"


Source = Literal["parent", "first", "sum", "each"]


@dataclass(frozen=True, slots=True)
class Column:
    name: str
    type: pa.DataType
    unit: str
    description: str
    source: Source = "parent"
    """Who provides the value: the parent, or the ranks, which report it under the same name (first: rank 0's value; sum: over ranks;
    each: a list with each rank's value)."""


_TEXT, _INT, _FLOAT = pa.string(), pa.int64(), pa.float64()
_INTS, _FLOATS = pa.list_(_INT), pa.list_(_FLOAT)
_NODES = pa.list_(
    pa.struct(
        [
            ("host", _TEXT),
            ("node", _INT),
            ("huge_gib", _FLOAT),
            ("heap_gib", _FLOAT),
            ("stack_gib", _FLOAT),
            ("private_gib", _FLOAT),
            ("total_gib", _FLOAT),
        ]
    )
)
_SHARES = pa.list_(
    pa.struct([("host", _TEXT), ("node", _INT), ("added_gib", _FLOAT), ("share", _FLOAT), ("requested_share", _FLOAT)])
)
_ROLES = pa.list_(
    pa.struct(
        [
            ("host", _TEXT),
            ("rank", _INT),
            ("role", _TEXT),
            ("bytes", _INT),
            ("node", _INT),
            ("share", _FLOAT),
            ("requested_share", _FLOAT),
        ]
    )
)

# Columns are added, never renamed or retyped. scripts/docs.py generates docs/columns.md from this list.
MEASURED = [
    Column("run_id", _TEXT, "", "identifies what is measured: hash of the resolved config"),
    Column("attempt", _INT, "", "1 for the first attempt at this run_id in this results folder"),
    Column("series_id", _TEXT, "", "run_id without the sequence length: rows of one series differ in nothing else"),
    Column("sweep", _TEXT, "", "name of the sweep that ran it; null for a single run"),
    Column("repeat", _INT, "", "number of the repetition of the same measurement, from 1"),
    Column("system", _TEXT, "", "the user's name for the machine"),
    Column("started_at", pa.timestamp("us", tz="UTC"), "UTC", "when the parent claimed the attempt"),
    Column("duration_s", _FLOAT, "s", "from the claim to the row"),
    Column("parent_s", _FLOAT, "s", "the parent's part of duration_s: without its time waiting for the ranks"),
    Column("hosts", pa.list_(_TEXT), "", "machines that ran ranks"),
    Column("job_id", _TEXT, "", "SLURM's job that ran it, as squeue and scancel take it; null outside a job"),
    Column("device_type", _TEXT, "", "cuda or cpu"),
    Column("status", _TEXT, "", "ok, invalid, skipped, oom_device, oom_host, timeout, interrupted, error"),
    Column("exit_code", _INT, "", "exit code of the first rank that failed; null when a signal ended it"),
    Column("signal", _TEXT, "", "signal that ended the first rank that failed, e.g. SIGSEGV"),
    Column("error_type", _TEXT, "", "exception type, if there was an exception"),
    Column("error_message", _TEXT, "", "one line"),
    Column("log_path", _TEXT, "", "log of the first rank that failed, else of rank 0; relative to the results folder"),
    Column("trace_path", _TEXT, "", "trace.parquet: memory and devices over the run; relative to the results folder; of several hosts, the first one's; null with monitor.interval_s=0, or if there is none for the reason in notes"),
    Column("config_json", _TEXT, "", "the complete resolved config"),
    Column("deepspeed_config_json", _TEXT, "", "the effective DeepSpeed config", source="first"),
    Column("parameters", _INT, "", "parameters of the model", source="first"),
    Column("trainable_parameters", _INT, "", "parameters that the optimizer updates", source="first"),
    Column("attention", _TEXT, "", "attention implementation that ran", source="first"),
    Column("liger_modules", _INT, "", "number of modules that run Liger's kernels; 0 without Liger", source="first"),
    Column("fused_step", pa.bool_(), "", "whether ldft's kernel updated the offloaded weights; false: another kernel did, or nothing is offloaded", source="first"),
    Column("overlap_step", pa.bool_(), "", "whether that update ran beside the next forward pass", source="first"),
    Column("gpu_share_gib", _FLOAT, "GiB", "device memory on each GPU for the parameters that it updates although they are offloaded (offload.gpu_share); 0: none", source="first"),
    Column("mlp_tiles", _INT, "", "tiles of tokens in which each MLP ran (kernels.mlp_tiles); 1: none", source="first"),
    Column("device_inputs", _INT, "", "kept layer inputs that stayed on the device with checkpointing=cpu (checkpointing.device_inputs); null in other modes", source="first"),
    Column("gpu_share_choice", _TEXT, "", "why as many, or why none; null where the question does not arise"),
    Column("iteration_s", _FLOATS, "s", "time of each iteration, barrier to barrier, on the slowest rank; warm-up included", source="first"),
    Column("forward_s", _FLOATS, "s", "forward part of each iteration, on the same rank; with overlap_step including waits for the update", source="first"),
    Column("backward_s", _FLOATS, "s", "backward part", source="first"),
    Column("step_s", _FLOATS, "s", "optimizer part: gradient norm and update; with overlap_step the norm and the start of the update", source="first"),
    Column("update_s", _FLOATS, "s", "time in each iteration during which the fused step's update was in progress, on the same rank; with overlap_step mostly the update of the iteration before, and in the last iteration its own too; null: another kernel updated, or nothing is offloaded", source="first"),
    Column("update_wait_s", _FLOATS, "s", "part of update_s during which the thread that launches the device's work waited for it; the device may have had work meanwhile", source="first"),
    Column("update_overlapped_gib", _FLOATS, "GiB", "memory that the update read and wrote in each iteration while training did not wait for it, summed over ranks", source="first"),
    Column("warmup_iterations", _INT, "", "number of leading samples excluded from medians"),
    Column("iteration_median_s", _FLOAT, "s", "median of iteration_s after warm-up"),
    Column("loss", _FLOATS, "", "loss of each iteration, mean over ranks and accumulation steps", source="first"),
    Column("learning_rate", _FLOATS, "", "learning rate of each iteration's update", source="first"),
    Column("skipped_updates", _INTS, "", "updates skipped in each iteration because fp16 gradients overflowed at the loss scale", source="first"),
    Column("tokens_per_iteration", _INT, "tokens", "over all ranks and accumulation steps"),
    Column("loss_tokens", _INTS, "tokens", "tokens of each iteration whose prediction counts in the loss, over all ranks and accumulation steps; all but the first of each sequence, or with data.loss=assistant the assistant's", source="first"),
    Column("documents_read", _INT, "", "documents of data.path that were read for this run's tokens, once each; null where no file is read", source="first"),
    Column("documents_skipped", _INT, "", "of these, documents left out because they are null or empty", source="first"),
    Column("sequences_skipped", _INT, "", "packed sequences left out because they hold no token to train on", source="first"),
    Column("tokens_per_s", _FLOAT, "tokens/s", "tokens_per_iteration / iteration_median_s, over all ranks"),
    Column("model_tflop_dense", _FLOAT, "TFLOP", "model FLOPs per iteration in matrix products with weights, of experts those that compute a token; null if unknown (see notes)", source="first"),
    Column("model_tflop_attention", _FLOAT, "TFLOP", "model FLOPs per iteration in causal attention; null if unknown", source="first"),
    Column("model_tflops_per_s", _FLOAT, "TFLOP/s", "model FLOPs / iteration_median_s, per rank; recomputation not counted; null if model FLOPs are"),
    Column("mfu", _FLOAT, "", "model_tflops_per_s / the device's dense peak; null if the peak is unknown"),
    Column("peak_vram_allocated_gib", _FLOATS, "GiB", "torch's peak of allocated device memory, per rank", source="each"),
    Column("peak_vram_reserved_gib", _FLOATS, "GiB", "torch's peak of reserved device memory, per rank", source="each"),
    Column("peak_host_gib", _FLOAT, "GiB", "sum over ranks of peak resident memory without file pages", source="sum"),
    Column("peak_rss_gib", _FLOATS, "GiB", "peak resident memory of each rank as wait4 reports it, file pages included"),
    Column("predicted_host_gib", _FLOAT, "GiB", "peak_host_gib as estimated before the run"),
    Column("predicted_host_json", _TEXT, "GiB", "parts of predicted_host_gib for each rank: roles of offloaded tensors, the process, ..."),
    Column("predicted_vram_gib", _FLOAT, "GiB", "peak_vram_allocated_gib per rank as estimated before the run; null on the CPU"),
    Column("predicted_vram_json", _TEXT, "GiB", "parts of predicted_vram_gib at the moment of the peak"),
    Column("predicted_iteration_s", _FLOAT, "s", "iteration_median_s as expected before the run; null on the CPU, or if the machine's rates are unknown (python -m ldft.bench machine)"),
    Column("predicted_forward_s", _FLOAT, "s", "forward part of predicted_iteration_s"),
    Column("predicted_backward_s", _FLOAT, "s", "backward part"),
    Column("predicted_step_s", _FLOAT, "s", "optimizer part"),
    Column("predicted_bound", _TEXT, "", "what was expected to take most of the time: arithmetic, Python, link or host update"),
    Column("modelled_traffic_s", _FLOAT, "s", "modelled time of a step's host-memory traffic; null if bandwidths are unknown"),
    Column("checkpoint_host_gib", _FLOAT, "GiB", "host memory that keeps layer inputs for the backward pass, over all ranks", source="sum"),
    Column("notes", pa.list_(_TEXT), "", "what makes this row differ from others, e.g. another algorithm, keys without effect, a loss that diverged, skipped updates"),
    Column("pinned", pa.bool_(), "", "whether offloaded tensors that DMA accesses were pinned", source="first"),
    Column("init_s", _FLOAT, "s", "from the start of rank 0's interpreter to the first iteration", source="first"),
    Column("init_imports_s", _FLOAT, "s", "part of init_s: importing torch, transformers and DeepSpeed", source="first"),
    Column("init_operators_s", _FLOAT, "s", "part of init_s: compiling or loading DeepSpeed's operators", source="first"),
    Column("init_data_s", _FLOAT, "s", "part of init_s: reading and tokenising data.path; null where no file is read", source="first"),
    Column("init_rendezvous_s", _FLOAT, "s", "part of init_s: process group", source="first"),
    Column("init_model_s", _FLOAT, "s", "part of init_s: building and initialising the model", source="first"),
    Column("init_checkpoint_buffers_s", _FLOAT, "s", "part of init_s: allocating host memory for layer inputs", source="first"),
    Column("init_engine_s", _FLOAT, "s", "part of init_s: deepspeed.initialize", source="first"),
    Column("init_placement_s", _FLOAT, "s", "part of init_s, within the parts above: placing, verifying and pinning arenas", source="first"),
    Column("init_first_touch_s", _FLOAT, "s", "part of init_s, within the parts above: first touch of every page of the arenas", source="first"),
    Column("nodes", _NODES, "GiB", "resident memory by NUMA node and kind after the last iteration, summed over ranks"),
    Column("numa_policy", _TEXT, "", "policy of the ranks: the requested one or, with numa=default, the caller's"),
    Column("numa_shares", _SHARES, "", "memory that the ranks added after the policy was set (without file pages), by node, with the requested share (null: none requested)"),
    Column("numa_passed_over", _INT, "", "allocations on the whole machine during the run that were intended for a requested node but went elsewhere because it had no free memory"),
    Column("khugepaged_gib", _FLOAT, "GiB", "memory on the whole machine that the kernel merged into huge pages during the run, each on the node that held most of it"),
    Column("numa_mechanism", _TEXT, "", "what spread the pages: kernel (one policy per range) or stripes (one policy per stripe); null with numa=default"),
    Column("roles", _ROLES, "bytes", "offloaded tensors by role, rank and node after the last iteration (move_pages): bytes of the role on the rank, the node's share of them (null: not verified, see notes), the requested share (null: none requested)"),
    Column("numa_kernel_weights_json", _TEXT, "", "the kernel's weights for weighted interleave during the run, by node; null before Linux 6.9"),
    Column("git_commit", _TEXT, "", "commit of the package's source, if it is a git checkout"),
    Column("git_dirty", pa.bool_(), "", "whether that checkout had uncommitted changes"),
    Column("source_hash", _TEXT, "", "hash of the package's Python files and of the config tree"),
    Column("versions", pa.map_(_TEXT, _TEXT), "", "versions of Python and the main packages"),
    Column("kernel", _TEXT, "", "kernel release"),
    Column("cpu", _TEXT, "", "CPU model"),
    Column("num_cores", _INT, "", "number of cores that the run was allowed to use"),
    Column("host_memory_gib", _FLOAT, "GiB", "MemTotal"),
    Column("gpus", pa.list_(_TEXT), "", "GPU models of the machine"),
    Column("driver", _TEXT, "", "NVIDIA driver version"),
    Column("host_environments_json", _TEXT, "", "kernel, CPU, cores, memory, GPUs and driver of each host, if several ran ranks"),
    Column("topology_json", _TEXT, "", "NUMA nodes: cores, memory, distances"),
]  # fmt: skip

_CONFIG_TYPES = {
    str: _TEXT,
    int: _INT,
    float: _FLOAT,
    bool: pa.bool_(),
    list[float]: _FLOATS,
    list[int]: pa.list_(_INT),
    list[str]: pa.list_(_TEXT),
}


def all_columns() -> list[Column]:
    """Every column of a row: the measured ones, then `cfg.<dotted key>` for each config key."""
    return MEASURED + [
        Column(f"cfg.{key}", _CONFIG_TYPES[kind], "", f"config key {key}") for key, kind in config_columns()
    ]


def schema() -> pa.Schema:
    """The row's schema; unit and description are field metadata."""
    return pa.schema(
        [pa.field(c.name, c.type, metadata={"unit": c.unit, "description": c.description}) for c in all_columns()],
        metadata={"ldft.schema_version": str(SCHEMA_VERSION)},
    )
