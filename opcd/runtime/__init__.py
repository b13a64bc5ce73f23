"""What a run needs of the machine.

console     output that arrives on any terminal, and never ends a run
files       files and folders that are complete or absent
progress    what a run tells whoever started it
stopwatch   times of a device's work, without waiting between its parts
upload      from the host to a device, without waiting for its queue
"""
