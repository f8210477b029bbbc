// Package handover is the conversation of two viasocks processes of which the new one takes the host over from the
// old one (`viasocks up --takeover`), without a cut connection and without a moment in which the host is open.
//
// The new process connects to the control socket of the old one, which answers as follows:
//
//	old -> new   Offer       what the two must agree on, the lock of the host, the queues of the TUN device
//	new -> old   Commit      one socket for each reader of the old process
//	old -> new   Ready       the old process is about to let go
//	new -> old   Go          from here on the host is the new process's
//	old -> new   Taken       the flows that the old process keeps; it changes nothing on the host any more
//	new -> old   InPlace     the new process reads the device and watches the host
//	old -> new   Left        again and again: which flows have ended, until none is left; each is acknowledged
//
// An Offer may say instead why there is none. Up to Go, either side can give up, and nothing has changed. After Go, the
// device has no reader until the new process starts to read; the kernel keeps 500 frames for each queue meanwhile. If the old
// process fails between Go and Taken, or the new one at any time after Go, so does the other one, and the host stays closed, as
// after any crash. If the old one fails later, only its flows are lost.
package handover
