"""Where memory goes: one placement type for the process and for each tensor, checked against the machine.

Imports neither torch nor numpy: a worker must set its policy before it imports them, since a policy is per thread and memory
touched earlier stays where it is.
"""

import errno
import platform
from dataclasses import dataclass, replace
from fractions import Fraction

from ldft import _native
from ldft.errors import ConfigError, LdftError
from ldft.memory.topology import SYSFS, WEIGHTS_FOLDER, Topology, format_list, read_topology

KINDS = ("default", "bind", "preferred", "interleave", "weighted_interleave")
METHODS = ("auto", "kernel", "stripes")
NO_NUMA = 'choose from those, or see README, "Trying it without NUMA hardware"'

# The kernel's policy numbers (linux/mempolicy.h); the flags that numactl may add are higher bits.
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE, MPOL_LOCAL, MPOL_PREFERRED_MANY, MPOL_WEIGHTED = range(7)
_FLAGS = 0xE000
_MOST_STRIPES_WEIGHT = 1 << 20
MOST_KERNEL_WEIGHT = 255


class PlacementError(ConfigError, ValueError):
    """A placement that is wrong in itself or on this machine. One line, for the user: key, value, what is allowed, fix."""


class HostMemoryError(LdftError, MemoryError):
    """Host memory could not be allocated, or not on the requested nodes. One line, for the user. Nothing stays allocated."""


class NumaCallError(PlacementError):
    """A system call that a placement needs is forbidden here, by a container or by a kernel without NUMA. One line, for the user.
    Not a lack of memory: a smaller allocation would be refused as well."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Placement:
    """Where pages go."""

    kind: str = "default"
    """default: the process policy. bind: on any of the nodes, nearest first, and nowhere else. preferred: the same, but on other
    nodes when these are full. interleave: evenly over the nodes. weighted_interleave: in proportion to the weights."""
    nodes: tuple[int, ...] = ()
    """Node numbers. Empty for kind default; for the interleaves, empty means every node with memory."""
    weights: tuple[int, ...] = ()
    """One positive integer per node, in the order of `nodes`; weighted_interleave only."""
    method: str = "auto"
    """How to interleave a tensor. kernel: the kernel, page by page; stripes: ranges with one policy each; auto: kernel if it
    achieves the requested shares, else stripes."""

    def __post_init__(self) -> None:
        # Lists come from configuration files.
        object.__setattr__(self, "nodes", tuple(self.nodes))
        object.__setattr__(self, "weights", tuple(self.weights))

    def describe(self) -> str:
        """Short and readable: "weighted_interleave of nodes 0,3 by 1:2"."""
        text = self.kind
        if self.nodes:
            text += f" of node{'s' if len(self.nodes) > 1 else ''} {format_list(self.nodes)}"
            if self.weights:
                text = f"{self.kind} of nodes {','.join(map(str, self.nodes))} by {':'.join(map(str, self.weights))}"
        return text

    def shares(self) -> dict[int, float] | None:
        """Node -> requested share of the bytes, summing to 1; None if the placement requests no shares."""
        if self.kind in ("bind", "preferred") and len(self.nodes) == 1:
            return {self.nodes[0]: 1.0}
        if self.kind in ("interleave", "weighted_interleave") and self.nodes:
            weights = self.weights or (1,) * len(self.nodes)
            return {node: weight / sum(weights) for node, weight in zip(self.nodes, weights, strict=True)}
        return None

    def validate(self, key: str = "numa") -> None:
        """Raise PlacementError for values that are wrong on any machine."""
        _check_alone(self, key)

    def resolve(self, topology: Topology, key: str = "numa") -> "Placement":
        """This placement with its nodes filled in, checked against the machine.

        Raises PlacementError that names the key, e.g. `key`.nodes.
        """
        self.validate(key)
        if self.kind == "default":
            return self
        nodes = self.nodes or topology.memory_nodes
        online = tuple(node.id for node in topology.nodes)
        for id in nodes:
            if id not in online:
                raise PlacementError(
                    f"{key}.nodes",
                    f"node {id} does not exist on this machine (online: {format_list(online)}); {NO_NUMA}",
                )
            if topology.node(id).total_bytes == 0:
                raise PlacementError(
                    f"{key}.nodes",
                    f"node {id} has no memory (nodes with memory: {format_list(topology.memory_nodes)}); {NO_NUMA}",
                )
            if id not in topology.allowed:
                raise PlacementError(
                    f"{key}.nodes",
                    f"node {id} is outside this process's cpuset (allowed: {format_list(topology.allowed)}); "
                    "choose from those, or widen the cpuset (cpuset.mems of the container or job)",
                )
        if self.kind == "weighted_interleave" and len(self.weights) != len(nodes):
            raise PlacementError(
                f"{key}.weights",
                f"{len(self.weights)} weight{'s' if len(self.weights) != 1 else ''} for {len(nodes)} "
                f"node{'s' if len(nodes) > 1 else ''} ({format_list(nodes)}); give one per node",
            )
        return replace(self, nodes=nodes)


def _check_alone(placement: Placement, key: str) -> None:
    """Raise PlacementError for values that are wrong on any machine."""
    kind, nodes, weights = placement.kind, placement.nodes, placement.weights
    if kind not in KINDS:
        raise PlacementError(f"{key}.kind", f"{kind!r} is unknown; choose from {', '.join(KINDS)}")
    if placement.method not in METHODS:
        raise PlacementError(f"{key}.method", f"{placement.method!r} is unknown; choose from {', '.join(METHODS)}")
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in nodes):
        raise PlacementError(f"{key}.nodes", f"{list(nodes)} must be node numbers, such as [0,3]")
    if len(set(nodes)) != len(nodes):
        raise PlacementError(f"{key}.nodes", f"{list(nodes)} lists a node twice; list each once")
    if kind == "default" and nodes:
        raise PlacementError(
            f"{key}.nodes", f"kind default takes no nodes, got {list(nodes)}; use kind bind or interleave"
        )
    if kind in ("bind", "preferred") and not nodes:
        raise PlacementError(f"{key}.nodes", f"kind {kind} needs at least one node, such as [0]")
    if kind != "weighted_interleave" and weights:
        raise PlacementError(
            f"{key}.weights", f"kind {kind} takes no weights, got {list(weights)}; use kind weighted_interleave"
        )
    for weight in weights:
        if not isinstance(weight, int) or isinstance(weight, bool) or not 1 <= weight <= _MOST_STRIPES_WEIGHT:
            raise PlacementError(f"{key}.weights", f"{weight!r} must be an integer from 1 to {_MOST_STRIPES_WEIGHT}")


def kernel_policy(placement: Placement) -> tuple[int, tuple[int, ...]]:
    """The kernel's policy for a resolved placement.

    bind becomes "preferred": if a node is full, pages spill to another node, which verification detects; with MPOL_BIND the kernel
    would kill the process. Several preferred nodes need Linux 5.15.
    """
    if placement.kind == "default":
        return MPOL_DEFAULT, ()
    if placement.kind == "interleave":
        return MPOL_INTERLEAVE, placement.nodes
    if placement.kind == "weighted_interleave":
        return MPOL_WEIGHTED, placement.nodes
    return (MPOL_PREFERRED if len(placement.nodes) == 1 else MPOL_PREFERRED_MANY), placement.nodes


def kernel_has_weights(placement: Placement, topology: Topology) -> bool:
    """Whether the kernel's weights equal those of a resolved placement, up to a common factor."""
    if any(node not in topology.weights for node in placement.nodes):
        return False
    ratios = {Fraction(topology.weights[n], w) for n, w in zip(placement.nodes, placement.weights, strict=True)}
    return len(ratios) == 1


def set_process_policy(policy: Placement, topology: Topology | None = None, key: str = "numa") -> Placement:
    """Set `policy` for the calling thread and for all threads and processes that it starts later.

    Call it before anything that starts threads or allocates much: memory already touched stays where it is. Returns the policy
    with its nodes filled in. Raises PlacementError if the machine does not support it (NumaCallError: the system call is
    forbidden), and HostMemoryError if the kernel refuses for another reason.
    """
    topology = topology or read_topology()
    placement = policy.resolve(topology, key)
    if placement.kind == "weighted_interleave":
        require_kernel_weights(placement, topology, key)
    mode, nodes = kernel_policy(placement)
    try:
        _native.set_thread_policy(mode, list(nodes))
    except OSError as error:
        if not is_harmless(error, placement, topology):
            raise refused(error, "set_mempolicy", placement.describe()) from error
    return placement


def process_policy(topology: Topology | None = None) -> Placement:
    """The kernel's policy for the calling thread, whoever set it (numactl, a parent process, ldft)."""
    try:
        mode, nodes = _native.thread_policy()
    except OSError:  # no NUMA in this kernel, or the container forbids the query
        return Placement()
    mode &= ~_FLAGS
    if not nodes or mode in (MPOL_DEFAULT, MPOL_LOCAL):
        return Placement()
    if mode == MPOL_WEIGHTED:
        weights = (topology or read_topology()).weights
        return Placement(
            kind="weighted_interleave", nodes=tuple(nodes), weights=tuple(weights.get(n, 1) for n in nodes)
        )
    names = {MPOL_PREFERRED: "preferred", MPOL_PREFERRED_MANY: "preferred", MPOL_BIND: "bind"}
    names[MPOL_INTERLEAVE] = "interleave"
    return Placement(kind=names[mode], nodes=tuple(nodes)) if mode in names else Placement()


def is_forbidden(error: OSError) -> bool:
    """Whether this call is forbidden here for any arguments: no NUMA in the kernel, or a container's profile."""
    return error.errno in (errno.ENOSYS, errno.EPERM)


def is_harmless(error: OSError, placement: Placement, topology: Topology) -> bool:
    """Whether a refused call makes no difference: the machine's only node was requested."""
    return is_forbidden(error) and len(topology.nodes) == 1 and set(placement.nodes) <= {topology.nodes[0].id}


def refused(error: OSError, call: str, what: str) -> LdftError:
    """The error to raise when the kernel refuses `call` for `what`: NumaCallError if it refuses any arguments."""
    if is_forbidden(error):
        # In Docker's default profile, the capability SYS_NICE allows the policy calls, but nothing allows move_pages.
        # Source: moby/profiles, seccomp/default.json.
        fix = "--cap-add SYS_NICE, or " if call == "set_mempolicy" else ""
        return NumaCallError(
            "numa",
            f"{what} needs {call}, which is forbidden here ({error.strerror}); in a container use {fix}--security-opt "
            "seccomp=unconfined, or a profile that allows mbind, set_mempolicy and move_pages; elsewhere use a kernel with "
            "NUMA, or numa=default",
        )
    reason = {
        errno.EINVAL: f"Linux {platform.release()} does not know this policy, or the cpuset leaves none of the nodes",
        errno.ENOMEM: "no memory for another mapping; raise vm.max_map_count",
    }.get(error.errno or 0, error.strerror or str(error))
    return HostMemoryError(f"{call}: {what} was refused: {reason}")


def weight_commands(placement: Placement) -> str:
    """The shell commands, for root, that set the kernel's weights to those of a resolved placement."""
    pairs = zip(placement.nodes, placement.weights, strict=True)
    return "; ".join(f"echo {weight} > {SYSFS / WEIGHTS_FOLDER}/node{node}" for node, weight in pairs)


def require_kernel_weights(placement: Placement, topology: Topology, key: str, *, ratio: bool = True) -> None:
    """Raise PlacementError if the kernel cannot apply these weights to a whole process or, with `ratio`, does not now."""
    if not topology.has_weighted_interleave:
        raise PlacementError(
            f"{key}.kind",
            f"weighted_interleave for a whole process needs Linux 6.9 or later, and this machine runs {platform.release()}; "
            "use kind interleave",
        )
    if max(placement.weights) > MOST_KERNEL_WEIGHT:
        raise PlacementError(
            f"{key}.weights", f"{max(placement.weights)} is above the kernel's largest weight, {MOST_KERNEL_WEIGHT}"
        )
    if ratio and not kernel_has_weights(placement, topology):
        have = ":".join(str(topology.weights.get(n, "none")) for n in placement.nodes)
        raise PlacementError(
            f"{key}.weights",
            f"the kernel's weights for nodes {','.join(map(str, placement.nodes))} are {have}, not "
            f"{':'.join(map(str, placement.weights))}; run as root, or have root run: {weight_commands(placement)}",
        )
