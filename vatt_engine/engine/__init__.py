"""The training step and what surrounds it; knows modules, losses and batches, and no modality."""

from vatt_engine.engine.config import EngineConfig
from vatt_engine.engine.engine import Engine
from vatt_engine.engine.optim import OptimConfig, build_optimizer
from vatt_engine.engine.schedule import ScheduleConfig, learning_rate

__all__ = ["Engine", "EngineConfig", "OptimConfig", "ScheduleConfig", "build_optimizer", "learning_rate"]
