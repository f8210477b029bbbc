// Package tun moves frames between the kernel's TUN device and the userspace stack, together with their offload
// header (struct virtio_net_hdr): so a 64 KiB TCP super-segment crosses in one system call and is neither cut nor
// merged on the way. A device has several queues, which are read in turn: one socket's flood fills its own. tun/netns
// opens the device; tun/tuntest has one in memory.
package tun
