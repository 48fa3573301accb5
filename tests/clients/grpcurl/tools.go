// Copyright The virtfleet authors. SPDX-License-Identifier: Apache-2.0

//go:build tools

// Package grpcurl pins the release of grpcurl that the tests run.
package grpcurl

import _ "github.com/fullstorydev/grpcurl/cmd/grpcurl"
