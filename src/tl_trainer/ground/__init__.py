"""What every room stands on: words, files, locks, downloads, memory, signals, progress bars."""
