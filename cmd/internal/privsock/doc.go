// Package privsock makes unix sockets that only their owner can use, and tells who is at the other end of one.
package privsock
