"""What a run needs of the machine.

alone        one process at a time in a folder
batches      sequences to batches that hold little padding
cache        where opcd keeps what it can make again
console      output that arrives on any terminal, and never ends a run
device       what a person is told of the device that a run takes
environment  which code and packages, and on which device
files        files and folders that are complete or absent
interrupts   how Ctrl-C and the end of a job reach a run
libraries    how those beneath are set up in a process of opcd's own
memory       how much a run has taken
processes    which process is which, and the end of one with its children
progress     what a run tells whoever started it
stopwatch    times of a device's work, without waiting between its parts
strict_json  what Python's JSON reader takes and the format does not have, and bombs
strict_yaml  YAML in which nothing is lost or guessed
trackers     where metrics go beside metrics.jsonl
untrusted    what a run folder must not hold, since it may be a stranger's
upload       from the host to a device, without waiting for its queue
user_code    functions of a user's own, from a module or a file
workers      processes that run such code, with a time limit a call
"""
