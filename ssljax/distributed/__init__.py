"""Device meshes, several processes, preemption, watchdog."""
