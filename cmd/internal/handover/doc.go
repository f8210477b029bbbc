// Package handover is the conversation of two viasocks processes of which the new one takes the host over from the
// old one (`viasocks up --takeover`), without a cut connection and without a moment in which the host is open.
//
// The new process connects to the control socket of the old one, which answers as follows:
//
//	old -> new   Offer       what the two must agree on, the lock of the host, the queues of the TUN device
//	new -> old   Commit      one socket for each reader of the old process
//	old -> new   Ready       the old process asks whether it shall let go now
//	new -> old   Go          it shall: from here on the host belongs to the new process
//	old -> new   Taken       the flows that the old process keeps; it changes nothing on the host any more
//	new -> old   InPlace     the new process reads the device and watches the host
//	old -> new   Left        again and again: which flows have ended, until none is left; each is acknowledged
//
// An Offer may contain the reason for a refusal instead. Until Go, either side can give up, and nothing has changed. After Go,
// nobody reads the device until the new process starts to; the kernel keeps 500 frames for each queue meanwhile. If the old
// process fails between Go and Taken, or the new one at any time after Go, the other one ends as well, and the host stays
// closed, as after any crash. If the old one fails later, only its flows are lost.
package handover
