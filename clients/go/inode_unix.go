//go:build unix

package virtfleet

import (
	"os"
	"syscall"
)

// inodeOf tells a replaced file from its predecessor where time and size are the same.
func inodeOf(info os.FileInfo) any {
	if system, ok := info.Sys().(*syscall.Stat_t); ok {
		return system.Ino
	}
	return nil
}
