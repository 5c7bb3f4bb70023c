"""oneDNN's batch norm as a peer: driver.cpp calls it, library.py loads the driver, calls.py makes the timed calls."""
