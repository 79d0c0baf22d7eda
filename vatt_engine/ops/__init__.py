"""The ops of the engine: one door each, implementations behind `vatt_engine.dispatch`."""
