// Package control is how one asks and tells a viasocks that is up: HTTP with JSON over a unix socket.
//
//	GET  /v1/status           Status
//	GET  /v1/flows?limit=N    Flows, the busiest first
//	POST /v1/confirm          202: the steering stays
//	POST /v1/down             202: it stops, and the socket goes when it has stopped
//
// The socket is its owner's (0600), or a group's too (0660), which may look and not touch. Whoever connects is looked at
// by SO_PEERCRED: root and the daemon's own user may do everything. A request has no body, 8 KiB of header at most and
// five seconds. Of those who may do everything 16 connections are served at a time, and 16 of all others together; what is more
// is closed unanswered.
//
// Each instance of `run` has a socket of its own, in a directory that only its user can look into (see Runtime); it answers status
// and flows. Instances lists them.
//
// Beside the socket of `up` lies a lock file. It is held while a daemon lives, also one that has no socket yet or is half dead, so
// that there is one in each network namespace, to which the path of both belongs.
package control
