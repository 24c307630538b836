"""An spepolicy plugin: pin a window of the guest's SPE buffer."""
