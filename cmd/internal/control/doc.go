// Package control is the interface to a running viasocks: HTTP with JSON over a unix socket.
//
//	GET  /v1/status           Status
//	GET  /v1/flows?limit=N    Flows, the busiest first
//	GET  /v1/watch            an Event on a line whenever something happens to a flow, until the client goes
//	POST /v1/confirm          202: the steering stays
//	POST /v1/down             202: it stops, and the socket disappears when it has stopped
//
// The socket belongs to its owner (mode 0600), or also to a group (0660) that may read and change nothing. Clients
// are identified by SO_PEERCRED: root and the daemon's own user may do everything. A request has no body, a header of
// at most 8 KiB, and five seconds. 16 connections of those who may do everything are served at a time, and 16 of all
// others together; further ones are closed without an answer.
//
// Each instance of `run` has its own socket, in a directory that only its user can read (see Runtime). It answers
// status and flows. Instances lists them.
//
// Next to the socket of `up` there is a lock file. It is held while a daemon is alive, even if it has no socket yet
// or hangs, so that there is at most one in each network namespace, to which the path of both files belongs.
package control
