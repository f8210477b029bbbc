// Package process keeps our own process in order: its memory, processors and open files, a log that never blocks, the
// signs of life for systemd, and what tells waiting programs that it is ready. It knows nothing of flows and of the host.
package process
