// Package owner finds the processes that hold a socket, from sock_diag and /proc.
package owner
