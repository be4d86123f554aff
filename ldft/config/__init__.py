"""Every config key of ldft, typed, with its unit and its checks. Importable without torch and without Hydra."""

from ldft.config.attention import AttentionConfig, AttentionKind
from ldft.config.checkpointing import CheckpointingConfig
from ldft.config.data import DataConfig, DataKind, DataLoss
from ldft.config.kernels import KernelsConfig
from ldft.config.launch import Device, LaunchConfig
from ldft.config.lora import LoraConfig
from ldft.config.machine import THIS, HostLayout, MachineConfig
from ldft.config.memory import MemoryConfig, Pinning
from ldft.config.model import ModelConfig, Weights
from ldft.config.monitor import MonitorConfig
from ldft.config.numa import NumaConfig, NumaKind, NumaScope, NumaStrategy
from ldft.config.offload import OffloadConfig, OffloadDevice
from ldft.config.optimizer import OptimizerConfig, Schedule
from ldft.config.plan import Goal, PlanConfig
from ldft.config.results import ResultsConfig
from ldft.config.root import Config, columns, disagreements, from_dict, run_id, series_id, to_dict
from ldft.config.seq_len import SeqLenConfig
from ldft.config.sweep import Rerun, SweepConfig
from ldft.config.train import Precision, TrainConfig

__all__ = [
    "THIS",
    "AttentionConfig",
    "AttentionKind",
    "CheckpointingConfig",
    "Config",
    "DataConfig",
    "DataKind",
    "DataLoss",
    "Device",
    "Goal",
    "HostLayout",
    "KernelsConfig",
    "LaunchConfig",
    "LoraConfig",
    "MachineConfig",
    "MemoryConfig",
    "ModelConfig",
    "MonitorConfig",
    "NumaConfig",
    "NumaKind",
    "NumaScope",
    "NumaStrategy",
    "OffloadConfig",
    "OffloadDevice",
    "OptimizerConfig",
    "Pinning",
    "PlanConfig",
    "Precision",
    "Rerun",
    "ResultsConfig",
    "Schedule",
    "SeqLenConfig",
    "SweepConfig",
    "TrainConfig",
    "Weights",
    "columns",
    "disagreements",
    "from_dict",
    "run_id",
    "series_id",
    "to_dict",
]
